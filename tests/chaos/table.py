"""Tables of outcomes as CSV, with a line above that says how they were made."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_table(path: Path, rows: Sequence[Mapping[str, object]], command: str) -> None:
    """command: what makes it again, as somebody would type it."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    cpus, kernel = os.cpu_count(), platform.release().partition("-")[0]
    with path.open("w", newline="") as file:
        file.write(f"# {command}; commit {found.stdout.strip() or 'unknown'}; ")
        file.write(f"{cpus} shared cores, {platform.machine()}, Linux {kernel}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
