"""Start of the training process, `python -m edge_sdk.training --fd N ...`: what is wrong before
training, a missing torch too, reaches the agent as one line."""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

from edge_sdk.agent.pipe import Pipe
from edge_sdk.errors import EdgeError
from edge_sdk.hardware import process_memory
from edge_sdk.helpers import logs
from edge_sdk.helpers.imports import import_module, require_torch
from edge_sdk.protocol.messages import Fault


def main() -> int:
    parser = argparse.ArgumentParser(prog="edge_sdk.training")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--kept", type=Path)
    parser.add_argument("--measure-compute", action="store_true")
    parser.add_argument("--import", dest="imports", action="append", default=[])
    args = parser.parse_args()
    logs.set_up_trainer()
    pipe = Pipe(socket.socket(fileno=args.fd))
    process_memory.be_killed_before_others()  # the agent survives
    try:
        require_torch("training")
        for module in args.imports:
            import_module(module)
        from edge_sdk.training.worker import prepare

        serve = prepare(
            pipe, args.data, args.threads, args.device, args.calibration, args.measure_compute,
            args.kept,
        )  # fmt: skip
    except Exception as error:  # a torch of another CUDA or numpy, a module of the user's
        is_known = isinstance(error, EdgeError | ImportError)
        detail = str(error) if is_known else f"{type(error).__name__}: {error}"
        code = error.code if isinstance(error, EdgeError) else "config"
        pipe.send(Fault(code=code, detail=detail))
        return 1
    try:
        serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the agent is gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
