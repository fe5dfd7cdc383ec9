"""The aggregation kernel, the server's step, sampling."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from coordinator.aggregation.mean import OwnersMean
from coordinator.aggregation.server_optimizer import Server
from coordinator.cohorts.sampling import job_seed, sample
from coordinator.config import ServerOptions
from edge_sdk.errors import ShapeError
from tests.support.examples import client


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([value]) for name, value in values.items()}


def test_mean_over_owners_with_weights():
    # a: (1*10 + 3*30) / 4 = 25; b has one owner: 7; c has none: stays
    mean = OwnersMean()
    mean.add_(scalars(a=10.0), 1)
    mean.add_(scalars(a=30.0, b=7.0), 3)
    result = mean.result(scalars(a=0.0, b=0.0, c=5.0))
    assert {name: t.item() for name, t in result.items()} == {"a": 25.0, "b": 7.0, "c": 5.0}


def test_identical_contributions_come_out_bit_by_bit():
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    mean = OwnersMean()
    for weight in (3, 7, 1, 11, 0.1):
        mean.add_({"w": tensor}, weight)
    assert torch.equal(mean.result({"w": tensor})["w"], tensor)


def test_integers_take_the_largest_and_halves_are_summed_wide():
    mean = OwnersMean()
    mean.add_({"n": torch.tensor(3), "h": torch.tensor([2048.0]).half()}, 1)
    mean.add_({"n": torch.tensor(9), "h": torch.tensor([2050.0]).half()}, 1)
    result = mean.result({"n": torch.tensor(0), "h": torch.zeros(1).half()})
    assert result["n"].item() == 9
    assert result["h"].dtype == torch.float16
    assert mean._means["h"].item() == 2049.0  # not a float16 number


def test_contributions_are_not_changed_and_may_be_freed():
    tensor = torch.ones(3)
    mean = OwnersMean()
    mean.add_({"w": tensor}, 1)
    mean.add_({"w": torch.zeros(3)}, 1)
    assert tensor.tolist() == [1, 1, 1]


def test_zero_weight_changes_nothing_negative_is_refused():
    mean = OwnersMean()
    mean.add_(scalars(a=4.0), 0)
    assert mean.result(scalars(a=1.0))["a"].item() == 1.0
    with pytest.raises(ValueError, match="negative"):
        mean.add_(scalars(a=4.0), -1)


def test_other_shape_is_refused():
    mean = OwnersMean()
    mean.add_({"w": torch.zeros(2)}, 1)
    with pytest.raises(ShapeError, match="w is"):
        mean.add_({"w": torch.zeros(3)}, 1)


def test_server_momentum_by_hand():
    # b = 0.5, a = 0.75, w0 = 0. round 1: v = 4, w = 3. round 2: aggregate 7: v = 2 + 4 = 6, w = 7.5
    server = Server(scalars(w=0.0, s=0.0), {"w"}, ServerOptions(momentum=0.5, lr=0.75, ema=0.5))
    server.step(scalars(w=4.0, s=4.0))
    assert server.globals["w"].item() == 3.0
    assert server.globals["s"].item() == 4.0, "statistics follow the aggregate"
    server.step(scalars(w=7.0, s=7.0))
    assert server.globals["w"].item() == 7.5
    # served: (7.5 + 0.5 * 3) / 1.5 = 6
    assert server.served()["w"].item() == pytest.approx(6.0)


def test_plain_server_takes_the_aggregate_itself():
    server = Server(scalars(w=1.0), {"w"}, ServerOptions(serve="last"))
    aggregate = scalars(w=0.1)
    server.step(aggregate)
    assert server.globals["w"] is aggregate["w"]
    assert server.served() is server.globals


def test_served_average_is_never_fed_back():
    server = Server(scalars(w=0.0), {"w"}, ServerOptions(ema=0.9))
    for value in (1.0, 5.0, 9.0):
        server.step(scalars(w=value))
        assert server.globals["w"].item() == value
    # (9 + 0.9 * 5 + 0.81 * 1) / 2.71
    assert server.served()["w"].item() == pytest.approx(14.31 / 2.71)


@pytest.mark.parametrize(
    ("optimizer", "second"),
    [
        ("fedadam", 0.99 * 0.01 + 0.01 * 4.0),  # tau^2 = 0.01 at first
        ("fedyogi", 0.01 + 0.01 * 4.0),  # 4 is larger: it grows by 0.01 * 4
    ],
)
def test_adaptive_server_by_hand(optimizer, second):
    options = ServerOptions(
        optimizer=optimizer, momentum=0.9, lr=0.5, beta2=0.99, tau=0.1, serve="last"
    )
    server = Server(scalars(w=1.0), {"w"}, options)
    server.step(scalars(w=3.0))  # D = 2: first moment 0.1 * 2 = 0.2
    want = 1 + 0.5 * 0.2 / (second**0.5 + 0.1)
    assert server.globals["w"].item() == pytest.approx(want, rel=1e-5)
    # resumed, the second step is the same
    other = Server(scalars(w=0.0), {"w"}, options)
    other.load_state_dict({k: t.clone() for k, t in server.state_dict().items()})
    for one in (server, other):
        one.step(scalars(w=0.0))
    assert torch.equal(server.globals["w"], other.globals["w"])


def test_yogi_lets_the_second_moment_fall_slowly():
    # D = 0.01 after D = 2: adam forgets by 1 % of itself, yogi by 1 % of D^2 only
    falls = {}
    for optimizer in ("fedadam", "fedyogi"):
        options = ServerOptions(optimizer=optimizer, momentum=0.0, beta2=0.99, tau=0.1)
        server = Server(scalars(w=0.0), {"w"}, options)
        server.step(scalars(w=2.0))
        first = server.state_dict()["second/w"].item()
        server.step({"w": server.globals["w"] + 0.01})
        falls[optimizer] = first - server.state_dict()["second/w"].item()
    assert falls["fedyogi"] == pytest.approx(0.01 * 1e-4, rel=0.05)
    assert falls["fedadam"] > 100 * falls["fedyogi"]


@pytest.mark.parametrize(
    "options",
    [
        ServerOptions(lr=1000, momentum=0.5),
        ServerOptions(optimizer="fedyogi", lr=1000, tau=0.1),
    ],
    ids=lambda options: options.optimizer,
)
def test_a_step_that_is_not_finite_changes_nothing(options):
    """1000 * 3e36 is above float32's 3.4e38; of 3e36 alone the square is. The next step is taken
    as if the refused one had never been asked for."""
    server, other = (Server(scalars(w=0.0), {"w"}, options) for _ in range(2))
    for one in (server, other):
        one.step(scalars(w=2.0))
    before = server.state_dict()
    with pytest.raises(ShapeError, match="the server's step: w holds NaN or infinite"):
        server.step(scalars(w=3e36))
    assert all(torch.equal(tensor, before[key]) for key, tensor in server.state_dict().items())
    for one in (server, other):
        one.step(scalars(w=4.0))
    assert torch.equal(server.globals["w"], other.globals["w"])


CLIENTS = [client(f"c{i:02d}", 1 + (i >= 17) + (i >= 34)) for i in range(50)]  # 17, 17, 16


def test_sample_spreads_over_groups():
    # 10 of 50: 3.4 + 3.4 + 3.2 seats, so 3 or 4 each
    total = Counter()
    for round in range(1, 201):
        groups = Counter(c.exit for c in sample(CLIENTS, 10, seed=0, round=round))
        assert sum(groups.values()) == 10
        assert set(groups.values()) <= {3, 4}
        total += groups
    for exit, share in ((1, 3.4), (2, 3.4), (3, 3.2)):
        assert total[exit] / 200 == pytest.approx(share, abs=0.1)


def test_small_groups_get_their_share():
    # 1 of 12 clients has exit 3; of 3 seats it gets 3 / 12 on average, not none for ever
    clients = [client(f"c{i:02d}", 1 + (i >= 9) + (i >= 11)) for i in range(12)]
    open_jobs = sum(c.exit == 3 for r in range(400) for c in sample(clients, 3, seed=1, round=r))
    assert open_jobs / 400 == pytest.approx(0.25, abs=0.06)


def test_an_absent_client_changes_its_own_seat_only():
    full = sample(CLIENTS, 10, seed=0, round=3)
    missing = full[0]
    rest = sample([c for c in CLIENTS if c != missing], 10, seed=0, round=3)
    assert len({c.id for c in rest} & {c.id for c in full}) >= 8


def test_sample_is_a_function_of_seed_and_round():
    one = sample(CLIENTS, 10, seed=1, round=5)
    assert one == sample(list(reversed(CLIENTS)), 10, seed=1, round=5)
    assert one != sample(CLIENTS, 10, seed=1, round=6)
    assert one != sample(CLIENTS, 10, seed=2, round=5)


def test_everybody_gets_a_turn():
    seen = Counter(c.id for r in range(1, 101) for c in sample(CLIENTS, 10, seed=0, round=r))
    assert len(seen) == 50
    assert max(seen.values()) < 45  # 20 expected


def test_sample_of_none_or_too_many_is_everybody():
    assert len(sample(CLIENTS, None, seed=0, round=1)) == 50
    assert len(sample(CLIENTS, 80, seed=0, round=1)) == 50


def test_those_that_failed_get_the_seats_that_others_leave():
    first = {c.id for c in sample(CLIENTS, 10, seed=0, round=1)}
    others = [c for c in CLIENTS if c.id not in first]
    again = sample(CLIENTS, 10, seed=0, round=1, failed=first)
    assert again == sample(others, 10, seed=0, round=1)
    assert len(again) == 10
    # 3 have not failed: the other 7 seats are drawn from the 47 that have
    left = {c.id for c in CLIENTS[::20]}
    failed = {c.id for c in CLIENTS} - left
    filled = {c.id for c in sample(CLIENTS, 10, seed=0, round=1, failed=failed)}
    assert len(filled) == 10
    assert left < filled
    for count in (None, 80):
        assert len(sample(CLIENTS, count, seed=0, round=1, failed=failed)) == 50


def test_job_seed_depends_on_every_part():
    seeds = {job_seed(s, r, c) for s in (0, 1) for r in (1, 2) for c in ("a", "b")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**62 for seed in seeds)
