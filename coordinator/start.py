"""`edge-coordinator`: one line instead of a traceback where its extra is not installed."""

from __future__ import annotations

import os
import sys


def main() -> int:
    if sys.argv[1:2] == ["status"]:  # it needs no torch, which takes seconds to import
        from coordinator.cli_status import main as status

        try:
            return status(sys.argv[1:])
        except BrokenPipeError:  # as by `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    try:
        from coordinator.cli import main as run
    except ModuleNotFoundError as error:
        said = f'edge-coordinator: {error}; pip install "edge-sdk[coordinator]"'
        print(said, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return run()
