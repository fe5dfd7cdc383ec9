"""heterotune over two backbones, with made updates."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from msgspec.structs import replace

from coordinator.config import Backbone, ServerOptions
from coordinator.methods.registry import make_config, make_method
from coordinator.settings import with_backbones
from edge_sdk.errors import CapacityError, ConfigError, ShapeError
from edge_sdk.protocol.fields import Adapters
from edge_sdk.protocol.messages import Holdout
from tests.support.examples import answer, client, cnn, config

SMALL = Backbone(
    name="small", family="vit", exits=2, options={"dim": 8, "heads": 2, "patch": 4, "ffn": 8}
)
LARGE = Backbone(
    name="large",
    family="vit",
    exits=1,
    options={"dim": 12, "heads": 2, "patch": 4, "layers": 4, "ffn": 24},
)
DEMA = Adapters(kind="dema", rank=3, branches=2)
PLAIN = ServerOptions(momentum=0.0, lr=1.0, serve="last")
# The name of a tensor that both have, in each: block 1 of 2 and block 2 of 4 (from 0)
SHARED = {"small": "stages.1.0.adapter.branches", "large": "stages.0.3.adapter.branches"}


def settings(share="none", adapters=DEMA, backbones=(SMALL, LARGE), **changes):
    run = config("heterotune", model=replace(cnn(), adapters=adapters), server=PLAIN, **changes)
    return with_backbones(replace(run, own={"share": share}), backbones)


def method_of(share="none", **changes):
    return make_method(settings(share, **changes))


def clients_of(method, *variants):
    specs = method.offer().variants
    return [
        dataclasses.replace(client(f"c{place}", specs[v - 1].exit), stages=(), variant=v)
        for place, v in enumerate(variants)
    ]


def round_of(method, cohort, number=1, **changes):
    updates = [answer(who, method.assign(who, number), **changes) for who in cohort]
    return updates, method.aggregate(number, updates)


def current(method):
    """Copies of all tensors, by family and name."""
    return {
        (name, key): tensor.clone()
        for name, family in method.families().items()
        for key, tensor in family.current.items()
    }


def differing(one, other):
    return {key for key in one if not torch.equal(one[key], other[key])}


def shared_places(method):
    """(family, name) of the tensors that both have, by slot."""
    first, second = (f"stages.{{}}.adapter.{part}" for part in ("branches", "gate"))
    places = (("0.1", "0.1"), ("1.0", "0.3"))
    held = current(method)
    found = [
        {("small", name.format(small)), ("large", name.format(large))}
        for name in (first, second)
        for small, large in places
    ]
    assert all(place in held for pair in found for place in pair), sorted(held)
    return found


def test_each_is_the_mean_of_its_own_clients_and_of_its_trained_tensors():
    method = method_of()
    before = current(method)
    cohort = clients_of(method, 1, 1, 2)
    updates, metrics = round_of(method, cohort)
    after = current(method)
    for key, tensor in updates[2].tensors.items():
        assert torch.allclose(after["large", key], tensor)
    for key, tensor in updates[0].tensors.items():
        mean = (tensor + updates[1].tensors[key]) / 2
        assert torch.allclose(after["small", key], mean, atol=1e-6)
    moved = differing(before, after)
    assert moved
    assert all("adapter" in name or name.startswith("exits.") for _, name in moved)
    assert metrics.num_updates == 3


def test_with_nothing_shared_one_family_never_touches_the_other():
    method = method_of()
    before = current(method)
    round_of(method, clients_of(method, 2, 2))
    assert {name for name, _ in differing(before, current(method))} == {"large"}


@pytest.mark.parametrize("share", ["shared", "aligned"])
@pytest.mark.parametrize("kind", ["dema", "pq-lora"])
def test_one_family_with_anything_shared_is_as_with_nothing(share, kind):
    changes = {"backbones": (SMALL,), "adapters": Adapters(kind=kind, rank=3)}
    alone, sharing = method_of(**changes), method_of(share, **changes)
    for method in (alone, sharing):
        cohort = [client("a", 2), client("b", 2)]
        assert not method.offer().variants
        round_of(method, cohort)
    assert not differing(alone.current(), sharing.current())


@pytest.mark.parametrize("share", ["shared", "aligned"])
def test_what_is_shared_begins_alike_and_stays_so(share):
    method = method_of(share)
    start = current(method)
    pairs = shared_places(method)
    for number in (1, 2):
        held = current(method)
        assert all(torch.equal(held[one], held[other]) for one, other in pairs)
        round_of(method, clients_of(method, 1, 2, 2), number)
    assert differing(start, held) & set.union(*pairs)


def test_a_shared_slot_moves_by_the_mean_over_families():
    """2 clients of 10 examples against 1: weights 2/3 and 1/3. Moved by 0.3 and -0.6: 0. Tensors of
    one family alone move by its own mean."""
    method = method_of("shared")
    before = current(method)
    small, other, large = clients_of(method, 1, 1, 2)
    updates = [
        answer(who, method.assign(who, 1), shift=shift)
        for who, shift in ((small, 0.3), (other, 0.3), (large, -0.6))
    ]
    method.aggregate(1, updates)
    after = current(method)
    for place in set.union(*shared_places(method)):
        assert torch.allclose(after[place], before[place], atol=1e-6)
    own = ("small", "stages.0.1.adapter.up")
    assert torch.allclose(after[own], before[own] + 0.3, atol=1e-6)
    alone = ("large", "stages.0.2.adapter.branches")  # slot 1, which the small one has not
    assert torch.allclose(after[alone], before[alone] - 0.6, atol=1e-6)


def test_a_family_of_which_nobody_came_takes_the_shared_step():
    method = method_of("shared")
    before = current(method)
    round_of(method, clients_of(method, 2), shift=0.5)
    after = current(method)
    moved = {place for place in differing(before, after) if place[0] == "small"}
    assert moved == {p for pair in shared_places(method) for p in pair if p[0] == "small"}


@pytest.mark.parametrize("share", ["none", "shared", "aligned"])
def test_the_order_of_clients_changes_nothing(share):
    one, other = method_of(share), method_of(share)
    cohort = clients_of(one, 1, 2, 1, 2)
    updates = [answer(who, one.assign(who, 1), 7 + ord(who.id[1])) for who in cohort]
    one.aggregate(1, updates)
    other.aggregate(1, reversed(updates))
    after = current(other)
    for place, tensor in current(one).items():
        assert torch.allclose(tensor, after[place], atol=1e-6), place


@pytest.mark.parametrize("share", ["none", "aligned"])
def test_a_run_goes_on_to_the_same_bytes(share):
    changes = {"holdout": 0.2, "server": ServerOptions(momentum=0.5, lr=0.5, serve="last")}
    run = replace(settings(share), **changes)
    straight, stopped = make_method(run), make_method(run)
    cohort = clients_of(straight, 1, 2, 2)
    for number in (1, 2):
        for method in (straight, stopped):
            guarded_round(method, cohort, number, [1.0] * 3)
    resumed = make_method(run)
    resumed.load_state_dict({k: t.clone() for k, t in stopped.state_dict().items()})
    for method in (straight, resumed):
        guarded_round(method, cohort, 3, [2.0, 0.5, 0.5])
    assert not differing(straight.state_dict(), resumed.state_dict())
    with pytest.raises(ShapeError):
        resumed.load_state_dict({**stopped.state_dict(), "other/w": torch.zeros(1)})


def guarded_round(method, cohort, number, losses):
    """The clients tell these losses of the models that they received."""
    updates = [
        answer(who, method.assign(who, number), num_examples=1 if who.variant == 1 else 100)
        for who in cohort
    ]
    told = []
    for update, loss in zip(updates, losses, strict=True):
        held = Holdout(num_examples=5, loss=loss, metric=0.5)
        message = replace(update.message, holdout=held)
        told.append(dataclasses.replace(update, arrived=replace(update.arrived, update=message)))
    return method.aggregate(number, told)


def test_a_small_family_that_got_worse_than_its_start_is_served_as_before_and_shares_no_more():
    method = method_of("shared", holdout=0.2)
    cohort = clients_of(method, 1, 2, 2)
    start = method.families()["small"].current
    guarded_round(method, cohort, 1, [1.0, 1.0, 1.0])
    metrics = guarded_round(method, cohort, 2, [1.5, 0.5, 0.5])
    assert metrics.values["small.saved_loss"] == pytest.approx(-0.5)
    assert metrics.values["large.saved_loss"] == pytest.approx(0.5)
    served = {name: family.served for name, family in method.families().items()}
    assert not differing(served["small"], start)
    assert differing(served["large"], method.families()["large"].current), "a round older"
    spec, tensors = method.deployed(cohort[0])
    assert spec == method.offer().variants[0]
    assert not differing(tensors, start)
    before = current(method)
    round_of(method, clients_of(method, 2), number=3, shift=0.5)
    assert {name for name, _ in differing(before, current(method))} == {"large"}
    found = guarded_round(method, cohort, 4, [0.9, 0.9, 0.9])
    assert found.values["small.saved_loss"] == pytest.approx(0.1)
    assert differing(method.families()["small"].served, start), "better at last"


def test_without_a_holdout_the_last_model_is_served():
    method = method_of()
    round_of(method, clients_of(method, 1, 2))
    for family in method.families().values():
        assert family.served is family.current
    assert (method.current(), method.served()) == ({}, {})


def test_whole_models_are_trained_without_adapters():
    method = method_of(adapters=None)
    updates, _ = round_of(method, clients_of(method, 1))
    assert updates[0].tensors.keys() == method.families()["small"].current.keys()


def test_a_client_without_a_backbone_is_told():
    method = method_of()
    with pytest.raises(CapacityError, match="a holds none of the 2 backbones"):
        method.assign(client("a", 1), 1)


def test_adapters_are_the_default():
    assert make_config("heterotune", cnn(), rounds=1).model.adapters == Adapters(kind="dema")
    lora = replace(cnn(), adapters=Adapters(kind="lora"))
    assert make_config("heterotune", lora, rounds=1).model.adapters == lora.adapters
    assert make_config("fedavg-l", cnn(), rounds=1).model.adapters is None


def renamed(**changes):
    """A second small one."""
    return {"backbones": (SMALL, replace(SMALL, name="x", **changes))}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"share": "shared", "adapters": Adapters(kind="lora")}, "shared: with --adapt lora"),
        ({"share": "aligned", "adapters": None}, "--share aligned: with --adapt none"),
        ({"backbones": (LARGE, SMALL)}, "small has .* comes after large.*smallest first"),
        (renamed(options={"dims": 3}), "--backbones: x: .*dims"),
        (renamed(family="vitt"), "--backbones: x: .*vitt.*known"),
        (renamed(family="llama"), "--backbones: x: .*llama"),
        ({"exit_weights": (1.0, 2.0)}, "--exit-weights are for one model"),
        ({"init": "x.safetensors"}, "--init is for one model"),
    ],
)
def test_what_cannot_be_is_one_line(changes, said):
    with pytest.raises(ConfigError, match=said) as told:
        method_of(**changes)
    assert "\n" not in str(told.value)


def test_two_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two are named small"):
        settings(backbones=(SMALL, SMALL))


def test_a_method_of_one_model_refuses_several():
    run = with_backbones(config("fedavg-l"), (SMALL, LARGE))
    with pytest.raises(ConfigError, match="'fedavg-l': --backbones has no place there"):
        make_method(run)
