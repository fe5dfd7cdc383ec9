"""What a testbed shows while it runs: its steps, boards that are ready, committed rounds."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from coordinator.config import read_config
from coordinator.store.status import read_status
from edge_sdk.errors import ConfigError, StoreError
from edge_sdk.tasks.metrics import METRICS
from tools.testbed.boards import Device


def tell(console: Console, text: str) -> None:
    """A line, now: somebody waits."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def follow(
    console: Console,
    folder: Path,
    server: subprocess.Popen[bytes],
    boards: dict[Device, subprocess.Popen[bytes]],
    num_rounds: int,
) -> None:
    """Show rounds as they are committed, until the coordinator ends. Raises ConfigError when a
    board ends early, or cannot take part and so keeps the first round from beginning."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[tested]}"),
    ]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rounds", total=num_rounds, tested="boards are starting")
        seen = ready = 0
        while True:
            has_ended = server.poll() is not None
            finished = rounds_after(folder, seen)
            if not seen and ready < (ready := max(ready, num_ready(folder))):
                progress.update(task, tested=f"{ready} of {len(boards)} boards are ready")
                if not console.is_terminal:
                    tell(console, f"{ready} of {len(boards)} boards are ready")
            for seen, tested in finished:
                progress.update(task, completed=seen, tested=tested)
                if not console.is_terminal:
                    tell(console, f"round {seen}: {tested}")
            if has_ended:
                return
            for device, process in boards.items():
                trouble = last_error(device)
                if process.poll() not in (None, 0) or (seen == 0 and trouble):
                    raise ConfigError(f"{device.name}: {trouble or 'ended early, see its log'}")
            time.sleep(0.3)


def num_ready(folder: Path) -> int:
    """Boards that have told the coordinator what they can train."""
    with contextlib.suppress(StoreError):  # there is no new status yet
        if status := read_status(folder):
            return sum(client.exit > 0 for client in status.cohort.clients)
    return 0


def last_error(device: Device) -> str:
    """The last error line of a device's log, without its time; "" if there is none."""
    lines = (device.folder / "device.log").read_text(errors="replace").splitlines()
    errors = [line.partition(" ERROR ")[2] for line in lines if " ERROR " in line]
    errors += [line for line in lines if line.startswith("edge-sdk: ")]
    return errors[-1] if errors else ""


def rounds_after(folder: Path, seen: int) -> list[tuple[int, str]]:
    """Every round committed after this one, and the task's metric per exit of the served model as
    text, or of each of several, and that on hold-outs; "" where it was not evaluated."""
    found: dict[int, dict[str, list[float]]] = {}
    metric, on_holdouts = METRICS["classify"], "on hold-outs"
    with contextlib.suppress(sqlite3.Error):  # there is no database yet
        uri = (folder / "run.sqlite").as_uri() + "?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            for (config,) in db.execute("SELECT config FROM runs"):
                metric = METRICS[read_config(config, str(folder)).model.task]
            key = metric.key
            heads = {
                f"{key}_served_exit_": f"served {metric.name} per exit",
                f"holdout_{key}": on_holdouts,
            }
            of_family = f".{key}_exit_"
            for round, name, value in db.execute(
                "SELECT r.round, name, value FROM rounds AS r LEFT JOIN metrics AS m"
                " ON m.round = r.round AND (name LIKE ? OR name = ? OR name LIKE ?)"
                " WHERE r.round > ? ORDER BY r.round, name",
                (f"{key}_served_exit_%", f"holdout_{key}", f"%{of_family}%", seen),
            ):
                values = found.setdefault(round, {})
                if value is not None:
                    head = heads.get(name.rstrip("0123456789"), name.partition(of_family)[0])
                    values.setdefault(head, []).append(value)
    unit = " %" * metric.is_share
    return [
        (
            round,
            ", ".join(
                f"{head} {' / '.join(map(metric.shown, values))}{unit}"
                for head, values in sorted(told.items(), key=lambda item: item[0] == on_holdouts)
            ),
        )
        for round, told in found.items()
    ]
