"""`edge-coordinator`: no traceback where a library that its commands need is not installed, or for
Ctrl-C while they are imported."""

from __future__ import annotations

import sys

from edge_sdk.helpers.interrupts import INTERRUPTED
from edge_sdk.helpers.standard_streams import open_closed_streams


def main() -> int:
    open_closed_streams()
    try:
        try:
            from coordinator.cli.main import main as run
        except ImportError as error:
            reason = " ".join(str(error).split())
            again = f"install its wheel with [coordinator] again for {sys.executable}"
            said = f"edge-coordinator: {reason}; this installation is not whole; {again}"
            print(said, file=sys.stderr)
            return 1
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
