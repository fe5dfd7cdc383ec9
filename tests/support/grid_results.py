"""Made-up results of grids, as tools/experiments leaves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def evaluated(number: int, last: Sequence[float], served: Sequence[float], **more: object) -> dict:
    """A round as Store.history gives it. last, served: shares, exit 1 first; empty: not taken."""
    return {
        "round": number,
        "accuracy": list(last),
        "accuracy_served": list(served),
        "seconds": {"aggregate": 0.5},
        "bytes_up": 2_000_000,
        "bytes_down": 3_000_000,
        "figures": {},
    } | more


def write(
    folder: Path, label: str, seed: int, rounds: Sequence[dict], alpha: str = "0.5", flags: str = ""
) -> None:
    """A result and its record, as `run` leaves them."""
    name = f"fashion-even-{alpha}-{label}-s{seed}"
    cell = {"grid": "main", "label": label, "data": "fashion", "regime": "even", "alpha": alpha}
    origin = {"commit": "0123456789abcdef", "is_dirty": True, "machine": "x86_64"}
    record = {"cell": cell | {"seed": seed}, "command": f"--method {label} {flags}", **origin}
    (folder / f"{name}.record.json").write_text(json.dumps(record))
    (folder / f"{name}.json").write_text(json.dumps({"config": {}, "rounds": list(rounds)}))


def served_at(*shares: float) -> list[dict]:
    """One evaluated round, of all exits."""
    return [evaluated(1, shares, shares)]
