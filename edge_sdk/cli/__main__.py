"""`edge-sdk`, also as `python -m edge_sdk.cli`: no traceback where a library that it needs is not
installed, or for Ctrl-C while it is imported, which takes a second on a board."""

from __future__ import annotations

import sys

from edge_sdk.helpers.interrupts import INTERRUPTED
from edge_sdk.helpers.standard_streams import open_closed_streams


def main() -> int:
    open_closed_streams()
    try:
        try:
            from edge_sdk.cli.main import main as run
        except ImportError as error:
            reason = " ".join(str(error).split())
            again = f"install its wheel again for {sys.executable}"
            print(f"edge-sdk: {reason}; this installation is not whole; {again}", file=sys.stderr)
            return 1
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
