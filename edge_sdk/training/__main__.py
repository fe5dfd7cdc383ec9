"""Start and end of the trainer, `python -m edge_sdk.training --fd N`. What is wrong before
training, a missing torch too, and what ends it later reach the agent as one line."""

from __future__ import annotations

import argparse
import socket
import sys

from edge_sdk.agent.pipe import LastWords, Pipe, TrainerOptions
from edge_sdk.errors import EdgeError, TrainerError
from edge_sdk.hardware import process_memory
from edge_sdk.helpers import logs
from edge_sdk.helpers.imports import import_module, require_torch
from edge_sdk.helpers.standard_streams import open_closed_streams
from edge_sdk.helpers.text import one_line


def main() -> int:
    open_closed_streams()
    parser = argparse.ArgumentParser(prog="edge_sdk.training")
    parser.add_argument("--fd", type=int, required=True)
    pipe = Pipe(socket.socket(fileno=parser.parse_args().fd))
    logs.set_up_trainer()
    process_memory.be_killed_before_others()  # the agent survives
    try:
        options, _ = pipe.receive()
        assert isinstance(options, TrainerOptions)
        require_torch("training")
        for module in options.imports:
            import_module(module)
        from edge_sdk.training.worker import prepare

        serve = prepare(pipe, options)
    except (EOFError, ConnectionResetError):
        return 0  # the agent is gone
    except Exception as error:  # a torch of another CUDA or numpy, a module of the user's
        is_known = isinstance(error, EdgeError | ImportError)
        detail = str(error) if is_known else f"{type(error).__name__}: {error}"
        code = error.code if isinstance(error, EdgeError) else "config"
        pipe.send(LastWords(code=code, detail=detail))
        return 1
    try:
        serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the agent is gone
    except Exception as error:
        detail = one_line(f"{type(error).__name__}: {error}")
        pipe.send(LastWords(code=TrainerError.code, detail=detail))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
