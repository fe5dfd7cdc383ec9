"""What `emulate` and `serve` share around their rounds: the device, the store, signals, a line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from coordinator.config import RunConfig, differences
from coordinator.rounds import RoundReport
from coordinator.store import Store
from edge_sdk.errors import ConfigError, StoreError
from edge_sdk.trainer import usable_device


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name)


def check_folder(folder: Path | None, resume: bool) -> None:
    """Raise StoreError now rather than after data was read: a run is there, or none to resume."""
    if folder is None:
        return
    if resume:
        Store.resume(folder).close()
    else:
        Store.check_free(folder)


def open_store(folder: Path, config: RunConfig, kind: str, resume: bool) -> Store:
    """A new run, or with `resume` the one there, which must have the same settings."""
    store = Store.resume(folder) if resume else Store.create(folder, config, kind)
    try:
        store.lock()
    except StoreError:
        store.close()
        raise
    if store.config.to_json() != config.to_json():
        store.close()
        raise ConfigError(
            f"{folder} was started with other settings: {differences(store.config, config)}; "
            "resume with the same flags"
        )
    return store


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets an entry when SIGTERM or SIGINT arrives; a second SIGINT interrupts."""
    stopping: list[int] = []

    def note(number: int, frame: object) -> None:
        if stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_round(report: RoundReport) -> None:
    """One progress line."""
    totals = report.totals
    last = " / ".join(f"{100 * share:.1f}" for share in report.accuracy) or "-"
    served = " / ".join(f"{100 * share:.1f}" for share in report.accuracy_served) or "-"
    stale = f" and {totals.stale} late" if totals.stale else ""
    print(
        f"round {report.round}: {totals.returned} of {totals.chosen}{stale} returned, "
        f"accuracy per exit {last} %, served {served} %, {totals.wall_s:.1f} s",
        flush=True,
    )
