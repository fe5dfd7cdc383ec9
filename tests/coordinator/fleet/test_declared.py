"""What devices say of themselves is bounded before anybody goes by it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from coordinator.cohorts.base import Client
from coordinator.config import RotationOptions
from coordinator.fleet.declared import (
    LONGEST_S,
    MOST_LOSS,
    MOST_SQUARE,
    plausible_hello,
    plausible_ready,
    plausible_update,
)
from coordinator.methods.rotation import rotation
from edge_sdk.hardware.boards import board, board_names
from edge_sdk.hardware.measure import emulated
from edge_sdk.protocol.messages import PROTOCOL, ExitResult, Hello, Phase, Ready, Segment, Update
from tests.support.devices import PROFILE, WAIT_S

HELLO = Hello(
    protocol=PROTOCOL,
    client_id="pi",
    session="s",
    profile=PROFILE,
    num_examples=10,
    input_shape=(1, 8, 8),
    num_classes=3,
)


def of(**changes: Any) -> Any:
    return plausible_hello(replace(HELLO, profile=replace(PROFILE, **changes))).profile


def test_honest_devices_are_left_as_they_are(caplog):
    assert plausible_hello(HELLO) == HELLO
    for name in board_names():
        hello = replace(HELLO, profile=emulated(board(name), 80.0, 1e-5))
        assert plausible_hello(hello) == hello, name
    assert not caplog.messages


@pytest.mark.parametrize(
    ("field", "said", "taken"),
    [
        ("gflops", 1e9, 1e6),
        ("layer_s", 1e3, 1),
        ("cores", 4096.0, 1024.0),
        ("cores", 1e-300, 0.01),
        ("link_mbit_s", 1e-300, 1e-3),
        ("link_mbit_s", None, None),
        ("memory_total_bytes", 2**53, 2**44),
        ("cpu_scale", 1e9, None),  # no emulated board
    ],
)
def test_figures(field, said, taken, caplog):
    assert getattr(of(**{field: said}), field) == taken
    lines = [line for line in caplog.messages if line.startswith("pi says of itself")]
    assert len(lines) == (said != taken)
    assert all(field in line and "bounded to the plausible" in line for line in lines)


def test_more_memory_available_than_there_is():
    assert of(memory_total_bytes=1000, memory_available_bytes=2**53).memory_available_bytes == 1000


def test_an_emulated_board_keeps_its_scale_within_bounds():
    assert of(is_emulated=True, cpu_scale=8.0).cpu_scale == 8.0
    assert of(is_emulated=True, cpu_scale=1e9).cpu_scale == 1e4


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ("raspberry-pi-4", "raspberry-pi-4"),
        (" generic ", "generic"),
        ("pi\u202egnp.exe", "pi\\u202egnp.exe"),  # turns a line around
        ("a\u200bb", "a\\u200bb"),
        ("x" * 200, "x" * 35 + " ... " + "x" * 20),
    ],
)
def test_names(said, taken):
    assert of(platform=said).platform == taken
    assert of(board=said).board == taken


def test_predicted_seconds_and_what_rotation_makes_of_them():
    ready = plausible_ready(
        Ready(exit=1, stages=(2, 3), prefix_s=1e9, stage_s=(1e9, 0.0), reason="")
    )
    assert (ready.prefix_s, ready.stage_s) == (LONGEST_S, (LONGEST_S, 0.0))
    rule = rotation(RotationOptions(mode="add", stages=0), 0, 60.0)
    client = Client(id="pi", exit=1, stages=(2, 3), prefix_s=ready.prefix_s, stage_s=ready.stage_s)
    for round in range(1, 20):
        (segment,) = rule(client, round, (0.0, 0.0, 0.0))
        assert segment in {Segment(first=n, last=n) for n in (1, 2, 3)}


def test_an_updates_own_figures():
    update = Update(
        job="a" * 32,
        digest="b" * 32,
        round=1,
        num_examples=1,
        num_steps=1,
        exits=(
            ExitResult(exit=1, loss=1e308, metric=0.5),
            ExitResult(exit=2, loss=-1e308, metric=0.5),
            ExitResult(exit=3, loss=0.7, metric=0.5),
        ),
        phases={"train": Phase(wall_s=1e9, cpu_s=1e9), "wait": Phase(wall_s=2.0)},
        peak_memory_bytes=2**48,
        tensors=(),
    )
    taken = plausible_update(update)
    assert [result.loss for result in taken.exits] == [MOST_LOSS, 0.0, 0.7]
    assert taken.phases["train"] == Phase(wall_s=LONGEST_S, cpu_s=1024 * LONGEST_S)
    assert taken.phases["wait"] == Phase(wall_s=2.0)
    assert taken.peak_memory_bytes == 2**44
    squared = plausible_update(update, "regress")  # of house prices a loss is 1e10 and more
    assert [result.loss for result in squared.exits] == [MOST_SQUARE, 0.0, 0.7]
    prices = replace(update, exits=(ExitResult(exit=1, loss=4e10, metric=2e5),))
    assert plausible_update(prices, "regress").exits == prices.exits


def test_the_coordinator_goes_by_what_is_plausible(make_coordinator):
    coordinator = make_coordinator("pi")
    clients = coordinator.clients()
    device = coordinator.device("pi")
    profile = replace(PROFILE, platform='=HYPERLINK("http://x","y")', link_mbit_s=1e-300)
    device.hello(profile=profile)
    device.send(Ready(exit=1, prefix_s=1e9))
    (client,) = clients.result(WAIT_S)
    assert client.profile is not None
    assert client.profile.link_mbit_s == 1e-3
    assert client.prefix_s == LONGEST_S
