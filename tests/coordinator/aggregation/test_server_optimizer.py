"""From aggregate to model and served average: momentum, Adam, Yogi, by hand."""

from __future__ import annotations

import pytest
import torch

from coordinator.aggregation.server_optimizer import Server
from coordinator.config import ServerOptions
from edge_sdk.errors import ShapeError
from tests.support.examples import scalars


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
