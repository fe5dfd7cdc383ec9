"""Matricisation, canonical factors, the generators, and that they reach the model."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from coordinator.config import GeneratorOptions, ServerOptions
from coordinator.generators.factors import (
    Factors,
    dematricise,
    factorise,
    matricise,
    matrix_shape,
    reconstruct,
    refactorise,
)
from coordinator.generators.networks import FactorMlps, FlatMlps, SvdCodec
from coordinator.generators.pairwise import groups_of
from coordinator.generators.registry import make_generator
from coordinator.methods.registry import make_method
from edge_sdk.errors import ShapeError
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensor_lists import stage_of
from tests.support.examples import answer, client, cnn, config

SHAPES = [(3, 2), (4, 3, 5), (4, 3, 5, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matricise_puts_inputs_in_rows(shape):
    weight = torch.randn(shape)
    matrix = matricise(weight)
    assert tuple(matrix.shape) == matrix_shape(shape)
    assert torch.equal(dematricise(matrix, shape), weight)
    if len(shape) == 4:  # entry (ic * KH + kh, oc * KW + kw)
        assert matrix[1 * 5 + 4, 3 * 7 + 6] == weight[3, 1, 4, 6]


def test_separable_kernel_has_rank_one():
    # the published reshape without permutation gives rank 9 here
    a, b = torch.randn(3 * 3), torch.randn(4 * 3)
    weight = dematricise(torch.outer(a, b), (4, 3, 3, 3))
    assert torch.linalg.matrix_rank(matricise(weight)).item() == 1
    view = weight.reshape(3 * 3, 4 * 3)
    assert torch.linalg.matrix_rank(view).item() > 1


def test_factors_are_a_function_of_the_weight():
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    factors = factorise(matrix, 100)
    assert factors.left.shape == (6, 6), "rank is clipped to the smaller side"
    assert torch.allclose(reconstruct(factors), matrix, atol=1e-5)
    # signs are canonical: the largest entry of every left vector is positive
    peaks = factors.left.gather(1, factors.left.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()
    again = factorise(matrix.clone(), 100)
    assert torch.allclose(again.left, factors.left, atol=1e-5)


def test_truncation_is_the_best_approximation():
    # diag(3, 2, 1) at rank 2 leaves an error of 1
    factors = factorise(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    error = torch.diag(torch.tensor([3.0, 2.0, 1.0])) - reconstruct(factors)
    assert torch.linalg.norm(error).item() == pytest.approx(1.0, abs=1e-5)


def test_leading_factors_are_those_of_the_whole_svd():
    """Few large singular values beside slowly falling ones, as updates have them."""
    rng = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, 300, generator=rng, dtype=torch.float64))[0]
        for n in (300, 450)
    )
    values = torch.linspace(1, 0.1, 300, dtype=torch.float64)
    values[:5] += torch.linspace(30, 10, 5, dtype=torch.float64)
    best = (left[:, :20] * values[:20]) @ right.T[:20]
    matrix = ((left * values) @ right.T).float()
    for whole, want in ((matrix, best), (matrix.T.contiguous(), best.T)):
        factors = factorise(whole, 20)
        assert factors.left.shape == (20, len(whole))
        error = torch.linalg.norm(reconstruct(factors).double() - want) / torch.linalg.norm(best)
        assert error < 1e-5
        peaks = factors.left.gather(1, factors.left.abs().argmax(1, keepdim=True))
        assert (peaks > 0).all()


def test_zeros_and_broken_values_of_a_large_matrix():
    assert (reconstruct(factorise(torch.zeros(300, 300), 5)) == 0).all()
    with pytest.raises(ShapeError, match="no usable SVD"):
        factorise(torch.full((300, 300), float("nan")), 5)


def test_refactorising_is_factorising_the_product():
    rng = torch.Generator().manual_seed(0)
    made = Factors(torch.randn(3, 6, generator=rng), torch.randn(3, 9, generator=rng))
    again, want = refactorise(made), factorise(reconstruct(made), 3)
    assert torch.allclose(again.left, want.left, atol=1e-5)
    assert torch.allclose(again.right, want.right, atol=1e-5)


def test_gradient_by_factors_is_that_of_the_matrices():
    made, same_, true = (
        Factors(torch.randn(2, 1, 3, 4, generator=rng), torch.randn(2, 1, 3, 5, generator=rng))
        for rng in (torch.Generator().manual_seed(seed) for seed in (0, 0, 1))
    )
    for code in (made, same_):
        code.left.requires_grad_()
        code.right.requires_grad_()
    SvdCodec(3).backward(made, true, 0.5)
    (0.5 * (reconstruct(same_) - reconstruct(true)).square().sum()).backward()
    assert torch.allclose(made.left.grad, same_.left.grad, atol=1e-4)
    assert torch.allclose(made.right.grad, same_.right.grad, atol=1e-4)


def test_generated_factors_have_the_owners_rank():
    """Stage 1's (9, 4) makes a stage 2 of rank 4; owners' (12, 5) have rank 5."""
    options_ = {"channels": (3, 4, 5, 6)}
    spec = ModelSpec(family="vgg", input_shape=(3, 16), num_classes=3, exit=3, options=options_)
    options = GeneratorOptions(name="svd-mlp", rank=100, hidden=8, epochs=2)
    method = make_method(config("hypemefed", model=spec, generator=options))
    for number in (1, 2):
        updates = [answer(who, method.assign(who, number)) for who in COHORT]
        figures = method.aggregate(number, updates).values
    assert "trust_stage_3" in figures


def size(options: GeneratorOptions) -> int:
    made = make_generator(cnn(), options, 0)
    return sum(p.numel() for p in made.networks.parameters())


def test_size_does_not_depend_on_the_rank():
    sizes = {size(GeneratorOptions(name="svd-mlp", rank=rank)) for rank in (1, 100)}
    assert len(sizes) == 1


def test_network_sizes_by_hand():
    # left: 6 -> 5 -> 8, right: 9 -> 5 -> 10: (6*5+5 + 5*8+8) + (9*5+5 + 5*10+10) = 83 + 110
    network = FactorMlps(1, (6, 9), (8, 10), 5)
    assert sum(p.numel() for p in network.parameters()) == 193
    assert network(torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4, 9)).shape == (2, 1, 8, 10)
    # flattened: 54 -> 5 -> 80: 54*5+5 + 5*80+80 = 755
    naive = FlatMlps(1, (6, 9), (8, 10), 5)
    assert sum(p.numel() for p in naive.parameters()) == 755
    assert naive(torch.randn(2, 1, 6, 9)).shape == (2, 1, 8, 10)


def test_grouped_networks_are_independent():
    """Two pairs in one group give what each would give alone."""
    both, alone = FactorMlps(2, (6, 9), (8, 10), 5), FactorMlps(1, (6, 9), (8, 10), 5)
    left, right = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 9)
    for pair in (0, 1):
        alone.load_state_dict({k: t[pair : pair + 1] for k, t in both.state_dict().items()})
        want = alone(left[:, pair : pair + 1], right[:, pair : pair + 1])
        assert torch.allclose(both(left, right)[:, pair : pair + 1], want, atol=1e-6)


def matrices(spec):
    shapes = {name: tuple(t.shape) for name, t in initial_tensors(spec, 0).items()}
    return {name: s for name, s in shapes.items() if stage_of(name)[0] == "stages" and len(s) > 1}


def test_pairs_follow_the_stages():
    assert [(g.stage, g.sources, g.targets) for g in groups_of(matrices(cnn()))] == [
        (2, ("stages.0.3.weight",), ("stages.1.0.weight",)),  # not the stem stages.0.0
        (3, ("stages.1.0.weight",), ("stages.2.0.weight",)),
    ]
    vgg = ModelSpec(family="vgg", input_shape=(3, 32, 32), num_classes=10, exit=3)
    found = groups_of(matrices(vgg))
    assert sum(len(g.targets) for g in found) == 4  # two convolutions a block: 8 MLPs, as published


def test_equal_shapes_of_a_stage_are_one_group():
    shapes = {f"stages.{s}.{i}.weight": (4, 4, 3, 3) for s in range(3) for i in range(3)}
    assert [len(group.targets) for group in groups_of(shapes)] == [3, 3]


COHORT = [client("a", 1), client("b", 2), client("c", 3), client("d", 3)]
PLAIN = ServerOptions()


def after_rounds(rounds=1, patch=None, cohort=COHORT, **options):
    settings = {"name": "svd-mlp", "rank": 4, "hidden": 8, "epochs": 3} | options
    method = make_method(config("hypemefed", server=PLAIN, generator=GeneratorOptions(**settings)))
    if patch:
        patch(method._generator)
    figures = {}
    for number in range(1, rounds + 1):
        updates = [answer(who, method.assign(who, number)) for who in cohort]
        figures = method.aggregate(number, updates).values
    return method, figures


def owners_mean(cohort=COHORT):
    method = make_method(config("owners-mean", server=PLAIN))
    method.aggregate(1, [answer(who, method.assign(who, 1)) for who in cohort])
    return method.current()


def test_gain_zero_is_the_owners_mean_exactly():
    method, _ = after_rounds(gain=0.0)
    want = owners_mean()
    assert all(torch.equal(tensor, want[name]) for name, tensor in method.current().items())


def test_only_convolutions_are_generated():
    method, _ = after_rounds()
    want = owners_mean()
    changed = {name for name, t in method.current().items() if not torch.equal(t, want[name])}
    assert changed == {"stages.1.0.weight", "stages.2.0.weight"}


def test_garbage_reaches_the_model():
    """Published code assigns generated weights to a temporary: garbage changed nothing."""

    def garbage(generator):
        real = generator.generate

        def made(current, mean):
            for weight, tensors in real(current, mean):
                yield weight, {name: torch.full_like(t, 1e3) for name, t in tensors.items()}

        generator.generate = made

    method, _ = after_rounds(patch=garbage)
    # all have 10 examples: stage 2 is missing at a: 1000 / 4; stage 3 at a and b: 2 * 1000 / 4
    want = owners_mean()
    for name, owners, missing in (("stages.1.0.weight", 3, 1), ("stages.2.0.weight", 2, 2)):
        expected = (want[name] * owners + 1e3 * missing) / 4
        assert torch.allclose(method.current()[name], expected, atol=1e-2), name


def test_the_configured_rank_is_used():
    """Published code passes the round number as the rank, so it is 1 for ever."""
    seen = []

    def spy(generator):
        observe = generator.observe

        def observed(*args):
            observe(*args)
            seen.extend(f.left.shape[0] for f in generator._seen[-1].codes.values())

        generator.observe = observed

    after_rounds(rounds=2, patch=spy, rank=3)
    assert set(seen) == {3}


def test_generated_stage_three_comes_from_generated_stage_two():
    method, _ = after_rounds()
    generator = method._generator
    # one weak client beside the owners, so that what is generated is its own
    for who in COHORT:
        if who.id != "b":
            generator.observe(answer(who, method.assign(who, 9)), method.current(), 10.0)
    generator.fit(method.current(), 9)
    with torch.no_grad():
        first, second = generator.networks
        source = generator._seen[0].codes["stages.0.3.weight"]
        stage_2 = first(source.left[None, None], source.right[None, None])[0, 0]
        factors = factorise(stage_2, 4)
        stage_3 = second(factors.left[None, None], factors.right[None, None])[0, 0]
    made = {}
    for weight, tensors in generator.generate(method.current(), method.current()):
        assert weight == 10
        made |= tensors
    assert torch.allclose(matricise(made["stages.1.0.weight"]), stage_2, atol=1e-6)
    assert torch.allclose(matricise(made["stages.2.0.weight"]), stage_3, atol=1e-5)


def test_nothing_is_generated_for_a_stage_without_owner():
    weak = [client("a", 1), client("b", 2)]
    method, figures = after_rounds(cohort=weak)
    start = make_method(config("hypemefed")).current()
    assert torch.equal(method.current()["stages.2.0.weight"], start["stages.2.0.weight"])
    assert not any(name.endswith("stage_3") for name in figures)


def test_networks_are_warm_started_and_figures_say_what_they_are_worth():
    _, first = after_rounds(rounds=1, epochs=40, hidden=32)
    _, later = after_rounds(rounds=12, epochs=40, hidden=32)
    names = ("error_stage", "previous_stage", "trust_stage")
    assert set(first) == {f"{name}_{t}" for name in names for t in (2, 3)} | {"generator_bytes"}
    assert later["error_stage_2"] < first["error_stage_2"]


def test_round_is_forgotten_afterwards():
    method, _ = after_rounds()
    assert method._generator._seen == []


def test_ten_exits_are_chained():
    spec = replace(cnn(10), options={"channels": (4,) * 10})
    options = GeneratorOptions(name="svd-mlp", rank=4, hidden=8, epochs=2)
    method = make_method(config("hypemefed", model=spec, generator=options))
    cohort = [client("a", 1, 10), client("z", 10, 10)]
    made = {}
    generate = method._generator.generate

    def spied(*args):
        for weight, tensors in generate(*args):
            made.update(tensors)
            yield weight, tensors

    method._generator.generate = spied
    method.aggregate(1, [answer(who, method.assign(who, 1)) for who in cohort])
    assert len(made) == 9


def test_flipping_a_pair_of_signs_changes_no_prediction(monkeypatch):
    """An SVD may return either sign of each pair of vectors; published code takes them as they
    come, so its prediction depends on the library."""
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    network = FactorMlps(1, (6, 9), (8, 10), 5)
    real = torch.linalg.svd
    made = []
    for pattern in ((1, 1, 1, 1, 1, 1), (1, -1, 1, -1, -1, 1)):

        def flipped(matrix, full_matrices, pattern=pattern):
            signs = torch.tensor(pattern).float()
            u, s, vt = real(matrix, full_matrices=full_matrices)
            return u * signs, s, vt * signs.unsqueeze(1)

        monkeypatch.setattr(torch.linalg, "svd", flipped)
        factors = factorise(matrix, 100)
        made.append(network(factors.left[None, None], factors.right[None, None]))
    assert torch.allclose(made[0], made[1], atol=1e-6)
