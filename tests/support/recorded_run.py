"""A run's database with every kind of outcome in it, for the tests of its report."""

from __future__ import annotations

from pathlib import Path

import torch

from coordinator.cohorts.base import Absence, Client, ClientUpdate
from coordinator.config import RunConfig
from coordinator.methods.base import Metrics
from coordinator.store.store import Store
from edge_sdk.protocol.messages import DeviceProfile, ExitResult, ModelSpec, Phase, Segment
from tests.support.examples import client_update

CONFIG = RunConfig(
    method="stage-rotation",
    model=ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=10, exit=3),
    rounds=5,
)


def client(name: str, platform: str, exit: int, scale: float = 0, link: float = 0) -> Client:
    """scale: cpu_scale of an emulated board; 0: a real one."""
    profile = DeviceProfile(
        platform=platform,
        memory_total_bytes=2**31,
        memory_available_bytes=2**30,
        cores=4.0,
        gflops=10.0,
        link_mbit_s=link or None,
        is_emulated=scale > 0,
        cpu_scale=scale or None,
    )
    return Client(name, exit, num_examples=10, profile=profile)


PI_4 = "raspberry-pi-4"
PI = client("pi", PI_4, 1, scale=2.5, link=20.0)
NANO = client("nano", "jetson-nano", 3, scale=0.5, link=80.0)
REAL = client("real", PI_4, 2)  # of PI's platform, to be kept apart from it


def segments(of: Client, stages: tuple[int, ...]) -> tuple[Segment, ...]:
    """The client's own prefix, then every deeper stage alone."""
    prefix = max((stage for stage in stages if stage <= of.exit), default=0)
    deeper = [Segment(first=stage, last=stage) for stage in stages if stage > of.exit]
    return (*([Segment(first=1, last=prefix)] if prefix else []), *deeper)


def absence(of: Client, outcome: str, code: str, detail: str, down: int = 0) -> Absence:
    return Absence(of, segments(of, (of.exit,)), outcome, code, detail, bytes_down=down)


def update(
    of: Client,
    stages: tuple[int, ...],
    down: int,
    up: int,
    memory: int,
    retries: int = 0,
    /,
    micro_batch: int = 0,
    recompute: bool = False,
    **times: tuple[float, float | None],
) -> ClientUpdate:
    """down, up: bytes. times: wall and CPU seconds by phase."""
    return client_update(
        of,
        {},
        segments(of, stages),
        num_examples=10,
        exits=tuple(ExitResult(exit=stage, loss=1.0, metric=0.5) for stage in stages),
        phases={name: Phase(wall_s=wall, cpu_s=cpu) for name, (wall, cpu) in times.items()},
        peak_memory_bytes=memory,
        bytes_down=down,
        bytes_up=up,
        retries=retries,
        micro_batch=micro_batch,
        recompute=recompute,
    )


ROUNDS: tuple[tuple[ClientUpdate | Absence, ...], ...] = (
    (
        update(
            PI,
            (1, 3),
            5_000_000,
            2_500_000,
            300,
            wait=(3.0, None),
            download=(0.01, 0.001),
            load=(0.2, 0.1),
            train=(2.0, 1.0),
            upload=(0.02, None),
            micro_batch=16,
        ),
        update(NANO, (1, 2, 3), 10_000_000, 5_000_000, 0, download=(0.04, None), train=(4.0, None)),
        update(
            REAL,
            (1, 2),
            1_000_000,
            1_000_000,
            700,
            1,
            wait=(1.0, None),
            download=(0.5, 0.1),
            load=(0.3, 0.2),
            train=(8.0, 20.0),
            upload=(0.7, None),
        ),
    ),
    (
        update(
            PI,
            (1, 2),
            10_000_000,
            5_000_000,
            500,
            wait=(5.0, None),
            download=(0.03, 0.001),
            load=(0.4, 0.2),
            train=(3.0, 2.0),
            upload=(0.04, None),
            micro_batch=8,
            recompute=True,
        ),
        absence(NANO, "straggler", "late", "did not return in time", 2_000_000),
        absence(REAL, "failed", "trainer", "killed", 1_000_000),
    ),
    (
        absence(PI, "failed", "gone", "said nothing"),
        absence(NANO, "failed", "gone", "said nothing", 4_000_000),
        update(REAL, (1, 2), 3_000_000, 3_000_000, 600, 2, train=(6.0, 18.0), recompute=True),
    ),
)
# accuracy in rounds 1 and 3 only, as with eval_every = 2
VALUES: tuple[dict[str, float], ...] = (
    {"accuracy_exit_1": 0.2, "accuracy_served_exit_1": 0.2, "accuracy_exit_2": 0.3, "error": 9.0},
    {"error": 8.0},
    {
        "accuracy_exit_1": 0.5,
        "accuracy_served_exit_1": 0.4,
        "accuracy_exit_2": 0.7,
        "loss_exit_1": 0.5,
        "error": 0.25,
        "gap": float("nan"),
    },
)


def commit(store: Store, round: int) -> None:
    phases = {"aggregate": Phase(wall_s=0.2 * round, cpu_s=0.1)}
    metrics = Metrics(values=dict(VALUES[round - 1]), phases=phases)
    store.commit(round, metrics, {"w": torch.zeros(1)}, "2026-01-01T00:00:00+00:00", 1.0)


def record_run(folder: Path) -> Store:
    """Three finished rounds, a fourth in progress; the store is still open."""
    store = Store.create(folder, CONFIG, "serve")
    for round, results in enumerate(ROUNDS, 1):
        store.begin(round, [PI, NANO, REAL])
        store.record_clients([PI, NANO, REAL])
        list(store.record_results(round, results))
        commit(store, round)
    list(store.record_results(4, ROUNDS[0]))
    return store
