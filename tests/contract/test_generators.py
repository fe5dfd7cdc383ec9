"""What every generator must do, alone and inside the method that uses it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from msgspec.structs import replace

from coordinator.config import GeneratorOptions, RotationOptions, ServerOptions
from coordinator.generators.registry import GENERATORS, make_generator
from coordinator.methods.registry import make_method
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import ModelSpec, Segment
from edge_sdk.protocol.tensor_lists import stage_of
from tests.support.examples import answer, client, cnn, config

NAMES = [name for name in GENERATORS if name != "none"]
SMALL = {"rank": 4, "hidden": 8, "epochs": 2}
COHORT = [client("a", 1), client("b", 1), client("c", 2), client("d", 3), client("e", 3)]
SPECS = {
    "cnn": cnn(),
    "cnn-2": cnn(2, (4, 5)),
    "cnn-10": cnn(10, (4,) * 10),
    "vgg": ModelSpec(
        family="vgg",
        input_shape=(3, 16),
        num_classes=3,
        exit=3,
        options={"channels": (3, 4, 5, 6)},
    ),
    "resnet18": ModelSpec(
        family="resnet18",
        input_shape=(1, 8, 8),
        num_classes=3,
        exit=3,
        options={"channels": (3, 4, 5, 6), "blocks": (1, 1, 1, 1)},
    ),
    "mlp": ModelSpec(
        family="mlp", input_shape=(4,), num_classes=3, exit=3, options={"widths": (5, 6, 7)}
    ),
    "lstm": ModelSpec(
        family="lstm", input_shape=(3, 9), num_classes=3, exit=2, options={"hidden": 5}
    ),
}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def options(name, **changes):
    return GeneratorOptions(name=name, **(SMALL | changes))


def hypemefed(name, spec=None, rotation="off", **changes):
    settings = config(
        "hypemefed",
        model=spec or cnn(),
        server=ServerOptions(serve="last"),
        generator=options(name, **changes),
        rotation=RotationOptions(mode=rotation),
        weighting="examples",
    )
    return make_method(settings)


def owners_mean(spec=None, rotation="off"):
    return make_method(
        config(
            "owners-mean",
            model=spec or cnn(),
            rotation=RotationOptions(mode=rotation),
            weighting="examples",
        )
    )


def related(who, job, number, num_examples=10):
    """An update whose stages move together: by one drawn amount along fixed directions, and a
    little noise. What stage 1 does tells what the others do."""
    update = answer(who, job, num_examples)
    rng = torch.Generator().manual_seed(1000 * number + sum(map(ord, who.id)))
    amount = torch.randn((), generator=rng)
    moved = {}
    for key, tensor in update.tensors.items():
        along = torch.Generator().manual_seed(sum(map(ord, key)))
        direction = torch.randn(tensor.shape, generator=along)
        noise = torch.randn(tensor.shape, generator=rng)
        moved[key] = job.tensors[key] + 0.1 * amount * direction + 0.01 * noise
    return dataclasses.replace(update, tensors=moved)


def play(method, rounds, cohort=COHORT, first=1):
    """Rounds of related updates; returns the last metrics."""
    metrics = None
    for number in range(first, first + rounds):
        jobs = [(who, method.assign(who, number)) for who in cohort]
        updates = [related(who, job, number, 5 + i) for i, (who, job) in enumerate(jobs)]
        metrics = method.aggregate(number, updates)
    return metrics


def open_gate(method):
    """Small networks need many rounds until their gate opens by itself."""
    if hasattr(method._generator, "_gates"):
        method._generator._gates.fill_(0.9)


def same(a, b):
    return all(torch.equal(tensor, b.current()[key]) for key, tensor in a.current().items())


def changed_by_generation(method, cohort=COHORT):
    """Names of the tensors that generation changes in a round after some others."""
    play(method, 6, cohort)
    open_gate(method)
    plain = owners_mean(method.spec)
    state = {f"server/globals/{k}": t.clone() for k, t in method.current().items()}
    state |= {"server/average_weight": torch.tensor(1.0), "owners": torch.zeros(method.spec.exit)}
    plain.load_state_dict(state)
    play(method, 1, cohort, first=7)
    play(plain, 1, cohort, first=7)
    return {k for k, t in method.current().items() if not torch.equal(t, plain.current()[k])}


@pytest.mark.parametrize("family", sorted(SPECS))
def test_it_generates_for_every_family(name, family):
    spec = SPECS[family]
    cohort = [client("a", 1, spec.exit), *(client(f"z{i}", spec.exit, spec.exit) for i in range(3))]
    method = hypemefed(name, spec)
    changed = changed_by_generation(method, cohort)
    assert {stage_of(key)[1] for key in changed} == set(range(2, spec.exit + 1))


@pytest.mark.parametrize("generate", ["conv", "conv+bn", "all"])
def test_what_is_generated(name, generate):
    method = hypemefed(name, generate=generate)
    before = method.current()
    changed = changed_by_generation(method)
    deep = [key for key in before if stage_of(key)[1] > 1 and "running" not in key]
    expected = {
        "conv": {key for key in deep if before[key].ndim == 4},
        "conv+bn": {key for key in deep if key.startswith("stages")},
        "all": set(deep),
    }[generate]
    assert changed == expected


def test_gain_zero_is_the_owners_mean_exactly(name):
    method, plain = hypemefed(name, gain=0.0), owners_mean()
    play(method, 6)
    play(plain, 6)
    assert same(method, plain)


def test_equal_depth_is_the_owners_mean_exactly(name):
    strong = [client(letter, 3) for letter in "abcd"]
    method, plain = hypemefed(name), owners_mean()
    play(method, 6, strong)
    play(plain, 6, strong)
    assert same(method, plain)


def test_nothing_before_the_first_fit(name):
    spec = cnn()
    generator = make_generator(spec, options(name), 0)
    sent = initial_tensors(spec, 0)
    method = owners_mean()
    for who in COHORT:
        generator.observe(answer(who, method.assign(who, 1)), sent, 1.0)
    assert list(generator.generate(sent, sent)) == []


def test_empty_memory_is_the_owners_mean_exactly():
    # update-regression answers from 4 rows on: one owner a round of stage 3, two of stage 2
    cohort = [client("a", 1), client("c", 2), client("d", 3)]
    method, plain = hypemefed("update-regression"), owners_mean()
    play(method, 2, cohort)
    play(plain, 2, cohort)
    assert same(method, plain)


def test_stage_without_owner_is_bit_identical(name):
    method = hypemefed(name, generate="all")
    play(method, 6)
    before = dict(method.current())
    play(method, 1, [client("a", 1), client("c", 2)], first=7)
    for key, tensor in method.current().items():
        assert torch.equal(tensor, before[key]) == (stage_of(key)[1] == 3), key


def test_order_of_clients_does_not_matter(name):
    methods = [hypemefed(name, owners_per_step=0) for _ in range(2)]
    for number in range(1, 7):
        updates = [related(who, methods[0].assign(who, number), number) for who in COHORT]
        methods[0].aggregate(number, updates)
        methods[1].aggregate(number, updates[::-1])
    for key, tensor in methods[0].current().items():
        assert torch.allclose(tensor, methods[1].current()[key], atol=2e-4), key


def test_identical_clients_in_identical_model_out():
    """Updates that are alike leave a residual generator nothing to add."""
    method = hypemefed("update-regression")
    play(method, 6)
    before = {key: tensor.clone() for key, tensor in method.current().items()}
    updates = [answer(who, method.assign(who, 7), shift=0.25) for who in COHORT]
    method.aggregate(7, updates)
    for key, tensor in method.current().items():
        assert torch.allclose(tensor, before[key] + 0.25, atol=1e-5), key


def test_garbage_changes_the_result(name):
    clean, garbled = hypemefed(name), hypemefed(name)
    play(clean, 6)
    play(garbled, 6)
    real = garbled._generator.generate
    yielded = []

    def garbage(current, mean):
        for weight, tensors in real(current, mean):
            yielded.append(weight)
            yield weight, {key: torch.full_like(t, 1e3) for key, t in tensors.items()}

    garbled._generator.generate = garbage
    for method in (clean, garbled):
        open_gate(method)
        play(method, 1, first=7)
    assert yielded
    assert not same(clean, garbled)


def test_only_what_a_client_did_not_train_is_generated(name):
    """With rotation, a weak client that trained stage 3 is an owner of it this round."""
    method = hypemefed(name, rotation="add")
    play(method, 6)
    open_gate(method)
    seen = {}
    real = method._generator.generate

    def spied(current, mean):
        for weight, tensors in real(current, mean):
            for key in tensors:
                seen[stage_of(key)[1]] = weight
            yield weight, tensors

    method._generator.generate = spied
    updates = [related(who, method.assign(who, 7), 7) for who in COHORT]
    lacking = {
        stage: sum(
            update.num_examples
            for update in updates
            if stage not in {s for g in update.segments for s in range(g.first, g.last + 1)}
        )
        for stage in (2, 3)
    }
    method.aggregate(7, updates)
    assert seen
    for stage, weight in seen.items():
        assert 0 < weight <= lacking[stage]


def test_state_goes_on_as_if_never_stopped(name):
    straight, stopped = hypemefed(name), hypemefed(name)
    play(straight, 5)
    play(stopped, 5)
    resumed = hypemefed(name)
    resumed.load_state_dict({key: t.clone() for key, t in stopped.state_dict().items()})
    play(straight, 3, first=6)
    play(resumed, 3, first=6)
    assert same(straight, resumed)


def test_memory_stays_at_its_bound(name):
    method = hypemefed(name, memory_rows=6, rank=3)
    early = max(play(method, 1, first=n).values["generator_bytes"] for n in range(1, 21))
    late = max(play(method, 1, first=n).values["generator_bytes"] for n in range(21, 101))
    assert 0 < late <= early


def test_regression_finds_a_planted_relation():
    """Deep updates that follow stage 1's are predicted: weak clients' share moves the mean to where
    it would be had they trained the stage."""
    method = hypemefed("update-regression", generate="all", rank=12)
    cohort = [client(letter, 3) for letter in "fghi"] + [client(letter, 1) for letter in "abc"]
    play(method, 12, cohort)
    distances = torch.zeros(2)
    for number in range(13, 21):
        full, plain = owners_mean(), owners_mean()
        state = {f"server/globals/{k}": t.clone() for k, t in method.current().items()}
        state |= {"server/average_weight": torch.tensor(1.0), "owners": torch.zeros(3)}
        strong = [client(who.id, 3) for who in cohort]
        everyone = [related(who, method.assign(who, number), number) for who in strong]
        weak = [u if u.client.id > "e" else _without_deep(u) for u in everyone]
        for other, updates in ((full, everyone), (plain, weak)):
            other.load_state_dict(state)
            other.aggregate(number, updates)
        figures = method.aggregate(number, weak).values
        assert figures["trust_stage_3"] > 0.7
        true = full.current()["stages.2.0.weight"]
        for place_, other in enumerate((method, plain)):
            distances[place_] += (other.current()["stages.2.0.weight"] - true).norm()
    assert distances[0] < 0.5 * distances[1]


def _without_deep(update):
    kept = {k: t for k, t in update.tensors.items() if stage_of(k)[1] == 1}
    arrived = replace(update.arrived, segments=(Segment(first=1, last=1),))
    return dataclasses.replace(update, tensors=kept, arrived=arrived)


def test_one_exit_or_no_name_is_no_generator(name):
    assert make_generator(cnn(1), options(name), 0) is None
    assert make_generator(cnn(), replace(options(name), name="none"), 0) is None


@pytest.mark.parametrize("size", [1e7, 1e20, 1e37])
def test_an_absurd_update_leaves_the_generator_as_it_was(name, size):
    method = hypemefed(name)
    play(method, 5)
    jobs = [(who, method.assign(who, 6)) for who in COHORT]
    updates = [related(who, job, 6, 5 + i) for i, (who, job) in enumerate(jobs)]
    wild = {key: torch.full_like(tensor, size) for key, tensor in updates[-1].tensors.items()}
    updates[-1] = dataclasses.replace(updates[-1], tensors=wild)
    method.aggregate(6, updates)
    state = method.state_dict()
    kept = [tensor for key, tensor in state.items() if key.startswith("generator/")]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept)
    assert max(float(tensor.abs().max()) for tensor in kept if tensor.numel()) < 1e6


def test_the_weight_of_generated_tensors_by_hand(name):
    """Clients of 5 to 9 examples: a, b lack stage 2 (11), a, b and c stage 3 (18)."""
    method = hypemefed(name)
    play(method, 6)
    open_gate(method)
    real, seen = method._generator.generate, {}

    def spied(current, mean):
        for weight, tensors in real(current, mean):
            seen.update({stage_of(key)[1]: weight for key in tensors})
            yield weight, tensors

    method._generator.generate = spied
    play(method, 1, first=7)
    if name == "svd-mlp-residual":  # gate g: owners g / (owners + (1 - g) lacking) of the lacking
        gates = method._generator._gates.tolist()
        lacking = {2: (11, 24), 3: (18, 17)}
        want = {s: n * o * gates[s] / (o + (1 - gates[s]) * n) for s, (n, o) in lacking.items()}
    else:
        want = {2: 11.0, 3: 18.0}
    assert seen == pytest.approx(want)


def test_gain_is_the_weight_of_the_generated(name):
    """Garbage 1000 at gain 0.5: half the weight of the same at gain 1."""
    found = {}
    for gain in (0.5, 1.0):
        method = hypemefed(name, gain=gain)
        play(method, 6)
        before = {k: t.clone() for k, t in method.current().items()}
        weights = {}

        def garbage(current, mean, weights=weights):
            for key in ("stages.1.0.weight", "stages.2.0.weight"):
                weights[key] = 7.0
                yield 7.0, {key: torch.full_like(current[key], 1e3)}

        method._generator.generate = garbage
        play(method, 1, first=7)
        owners = {"stages.1.0.weight": 24.0, "stages.2.0.weight": 17.0}
        for key, weight in weights.items():
            share = gain * weight / (owners[key] + gain * weight)
            found[key, gain] = float((method.current()[key] - before[key]).mean())
            assert found[key, gain] == pytest.approx(1e3 * share, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_gives_what_the_cpu_gives(name):
    methods = []
    for device in ("cpu", "cuda"):
        settings = config("hypemefed", server=ServerOptions(serve="last"), generator=options(name))
        methods.append(make_method(settings, device))
        play(methods[-1], 6)
    for key, tensor in methods[0].current().items():
        assert torch.allclose(tensor, methods[1].current()[key], atol=1e-4), key
