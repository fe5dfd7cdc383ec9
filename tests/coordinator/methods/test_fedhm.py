"""FedHM's server, by hand: what is sent at which rank, and what becomes of what returns."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from msgspec.structs import replace

from coordinator.aggregation.staleness import rebase_late_updates
from coordinator.config import ServerOptions
from coordinator.methods.registry import make_config, make_method
from edge_sdk.errors import CapacityError, ConfigError
from edge_sdk.models import build
from edge_sdk.models.factorised import merged, split
from edge_sdk.protocol.stream import layout
from edge_sdk.protocol.tensors import specs_of
from tests.support.examples import answer, client, cnn, config

MODEL = cnn(exit=2, channels=(8, 12))
NAME, BIAS = "stages.1.0.weight", "exits.0.2.bias"
V, U = "stages.1.0.v.weight", "stages.1.0.u.weight"
PLAIN = ServerOptions(serve="last")


def method(own=None, **changes):
    settings = {"model": MODEL, "server": PLAIN, "own": {"ranks": (0.25, 0.5, 1.0), **(own or {})}}
    return make_method(config("fedhm", **(settings | changes)))


def holder(name, variant):
    return dataclasses.replace(client(name, 2, 2), variant=variant)


LOW, MIDDLE, WHOLE = holder("a", 1), holder("b", 2), holder("c", 3)


def test_a_client_is_sent_the_largest_singular_values_of_the_weights():
    server = method()
    for who, rank in ((LOW, 3), (MIDDLE, 6)):
        job = server.assign(who, 1)
        assert job.model.rank == rank / 12
        v, u = split(server.current()[NAME], rank)
        assert torch.equal(job.tensors[V], v)
        assert torch.equal(job.tensors[U], u)
        have = build(job.model).tensors()
        assert {n: t.shape for n, t in job.tensors.items()} == {n: t.shape for n, t in have.items()}
        assert list(job.tensors) == list(have)
    assert torch.equal(server.assign(WHOLE, 1).tensors[NAME], server.current()[NAME])


def test_clients_of_a_rank_share_tensors_until_the_model_moves():
    server = method()
    other = holder("d", 1)
    job = server.assign(LOW, 1)
    assert server.assign(other, 1).tensors[V] is job.tensors[V]
    server.aggregate(1, [answer(LOW, job)])
    assert not torch.equal(server.assign(other, 2).tensors[V], job.tensors[V])


def test_bytes_of_a_job_are_those_of_the_factors():
    whole, low = (method().assign(who, 1) for who in (WHOLE, LOW))
    saved = 4 * (9 * 8 * 12 - 3 * 3 * (8 + 12))
    for sizes in (
        (job.returns for job in (whole, low)),
        map(specs_of, (whole.tensors, low.tensors)),
    ):
        more, less = (layout(tuple(specs))[1] for specs in sizes)
        assert more - less == saved


def test_product_of_the_factors_is_averaged_by_examples():
    server = method()
    low, whole = server.assign(LOW, 1), server.assign(WHOLE, 1)
    before = server.current()
    updates = [
        answer(LOW, low, num_examples=1, shift=0.5),
        answer(WHOLE, whole, num_examples=3, shift=0.5),
    ]
    server.aggregate(1, updates)
    product = merged(low.tensors[V] + 0.5, low.tensors[U] + 0.5)
    expected = (1 * product + 3 * (before[NAME] + 0.5)) / 4
    assert torch.allclose(server.current()[NAME], expected, atol=1e-5)
    assert torch.allclose(server.current()[BIAS], before[BIAS] + 0.5, atol=1e-6)


def test_without_a_whole_client_the_global_model_is_one_more():
    """Two clients of 1 and 3 examples moved a bias by 10 and 30. The global one counts like the
    mean of both: (1 x 10 + 3 x 30 + 2 x 0) / 6, without it a fourth of 100."""
    for own, moved in (({}, 100 / 6), ({"global_vote": False}, 25.0)):
        server = method(own)
        before = server.current()[BIAS]
        updates = [
            answer(who, server.assign(who, 1), num_examples=n, shift=shift)
            for who, n, shift in ((LOW, 1, 10.0), (MIDDLE, 3, 30.0))
        ]
        server.aggregate(1, updates)
        got = server.current()[BIAS] - before
        assert torch.allclose(got, torch.full_like(got, moved), atol=1e-4)


def test_with_a_tau_low_ranks_weigh_less():
    """Softmax of -1 / (rank tau): exp(-4 / 2) and exp(-1 / 2) for ranks 1/4 and 1."""
    server = method({"rank_tau": 2.0}, weighting="equal")
    before = server.current()[BIAS]
    server.aggregate(
        1, [answer(w, server.assign(w, 1), shift=s) for w, s in ((LOW, 10.0), (WHOLE, 30.0))]
    )
    low, whole = math.exp(-2), math.exp(-0.5)
    expected = (10 * low + 30 * whole) / (low + whole)
    assert (server.current()[BIAS] - before)[0] == pytest.approx(expected, abs=1e-4)


def test_a_kernel_of_low_rank_is_unchanged_where_nobody_trains():
    """a[o, y] b[i, x] is of rank 1 in the layout of the factors; laid out otherwise it is lost."""
    server = method()
    rng = torch.Generator().manual_seed(0)
    one, other = torch.randn(12, 3, generator=rng), torch.randn(8, 3, generator=rng)
    kernel = torch.einsum("oy,ix->oiyx", one, other)
    server.begin_from({NAME: kernel})
    server.aggregate(
        1, [answer(who, server.assign(who, 1), shift=0.0) for who in (LOW, MIDDLE, WHOLE)]
    )
    assert torch.allclose(server.current()[NAME], kernel, atol=1e-5)


def test_alike_clients_of_a_low_rank_are_as_one():
    results = []
    for count in (1, 3):
        server = method({"global_vote": False})
        clients = [holder(letter, 1) for letter in "abc"[:count]]
        server.aggregate(1, [answer(w, server.assign(w, 1), shift=0.25) for w in clients])
        results.append(server.current())
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


def test_a_late_update_moves_the_weights_of_now_by_its_own_movement():
    """A half-life late, the factors and all else that moved by 1 count as moved by 0.5."""
    server = method({"global_vote": False})
    job = server.assign(LOW, 1)
    server.aggregate(1, [answer(WHOLE, server.assign(WHOLE, 1), shift=1.0)])
    now = server.current()
    parameters = {name for name, _ in build(MODEL).named_parameters()}
    late = answer(LOW, job, shift=1.0)
    late = dataclasses.replace(late, staleness=2, sent=dict(job.tensors))
    server.aggregate(2, rebase_late_updates([late], now, parameters, half_life=2.0))
    moved = merged(job.tensors[V] + 0.5, job.tensors[U] + 0.5)
    moved = moved - merged(job.tensors[V], job.tensors[U])
    assert torch.allclose(server.current()[NAME], now[NAME] + moved, atol=1e-5)
    assert torch.allclose(server.current()[BIAS], now[BIAS] + 0.5, atol=1e-6)


def test_a_client_is_deployed_the_rank_that_it_holds():
    server = method()
    spec, tensors = server.deployed(LOW)
    assert spec == replace(MODEL, rank=0.25)
    build(spec).load(tensors)
    spec, tensors = server.deployed(client("nobody", 2, 2))
    assert (spec, list(tensors)) == (MODEL, list(server.current()))


def test_ranks_are_offered_cheapest_first_and_once():
    offered = method({"ranks": (1.0, 0.5, 0.125, 0.5)}).offer().variants
    assert [model.rank for model in offered] == [0.125, 0.5, 1.0]
    assert [model.exit for model in offered] == [2, 2, 2]


def test_settings_of_the_paper_and_what_is_refused():
    settings = make_config("fedhm", MODEL, is_paper=True, rounds=1)
    assert settings.weighting == "equal"
    assert [m.rank for m in make_method(settings).offer().variants] == [0.125, 0.25, 0.5, 1.0]
    with pytest.raises(ConfigError, match="rank 0.5: two factors make none"):
        lstm = replace(MODEL, family="lstm", input_shape=(1, 8), options={})
        method({"ranks": (0.5, 1.0)}, model=lstm)
    with pytest.raises(ConfigError, match="ranks"):
        method({"ranks": (0.0, 1.0)})
    with pytest.raises(CapacityError, match="nobody holds none of the 3 models"):
        method().assign(client("nobody", 2, 2), 1)
