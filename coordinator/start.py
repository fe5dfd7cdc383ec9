"""`edge-coordinator`: one line instead of a traceback where its extra is not installed."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from coordinator.cli import main as run
    except ModuleNotFoundError as error:
        said = f'edge-coordinator: {error}; pip install "edge-sdk[coordinator]"'
        print(said, file=sys.stderr)
        return 1
    return run()
