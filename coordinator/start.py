"""`edge-coordinator`, where Ctrl-C while its commands are imported is no traceback either."""

from __future__ import annotations

import sys

from edge_sdk.interrupts import INTERRUPTED


def main() -> int:
    try:
        from coordinator.cli import main as run

        return run()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
