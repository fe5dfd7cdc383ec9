"""Costs counted in a forked process: what counting takes, or a family's own code does, is gone with
it, and it ends after some time."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import msgspec
import torch
from msgspec.structs import replace

from edge_sdk.capacity.costs import ALLOWANCE, ERROR, SegmentCost
from edge_sdk.capacity.counting import each_cost, each_variant_cost, in_order
from edge_sdk.errors import CapacityError, ConfigError, EdgeError
from edge_sdk.hardware import process_memory
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.hardware.speed import torch_threads
from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.fields import MAX_LINE
from edge_sdk.protocol.messages import ModelSpec, Plan

log = logging.getLogger(__name__)
LIMIT_S = 200.0  # a trainer that says nothing for 300 s is ended (agent/watchdog.py)


def segment_costs_apart(
    spec: ModelSpec,
    plan: Plan,
    num_examples: int,
    runtime_bytes: int,
    allowance: float = ALLOWANCE,
    error: float = ERROR,
    memory_bytes: int = 0,
    limit_s: float = LIMIT_S,
    variants: Sequence[ModelSpec] = (),
) -> tuple[SegmentCost, ...]:
    """`segment_costs`, counted in a forked process, so that this one stays as it is. Segments that
    memory, or limit_s, did not do for are missing: training them takes more. memory_bytes: what
    that process may take, whatever the model; 0: any. variants: models that are counted instead of
    the spec's cuts, in their order and up to the first that does not fit (each_variant_cost).

    The fork knows the families registered here. It computes on one thread, as it has lost the
    others. With CUDA autograd's threads forbid it: such boards have the memory to count here.
    Raises ConfigError for a spec that cannot be built or trained, CapacityError if nothing was
    counted."""
    about = plan, num_examples, runtime_bytes
    count: Callable[[], Iterator[SegmentCost]] = partial(each_cost, spec, *about)
    ordered: Callable[[Iterable[SegmentCost]], list[SegmentCost]] = in_order
    if variants:
        count = partial(each_variant_cost, variants, *about, memory_bytes, allowance)
        ordered = list
    measured = partial(replace, allowance=allowance, error=error)
    if torch.cuda.is_available() or not hasattr(os, "fork"):
        with torch_threads(1):
            return tuple(map(measured, ordered(count())))
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork beside torch's threads
        pid = os.fork()
    if pid == 0:
        os.close(reader)
        _count_and_exit(writer, count, memory_bytes)
    os.close(writer)
    content, is_late = _read_until(reader, time.monotonic() + limit_s)
    if is_late:
        os.kill(pid, signal.SIGKILL)
    lines = content.split(b"\n")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status > 0:
        said = lines[-1].decode(errors="replace")
        raise ConfigError(said or f"counting the model's costs ended with status {status}")
    counted = [msgspec.json.decode(line, type=SegmentCost) for line in lines[:-1]]
    late = f"took more than {limit_s:g} s and was ended"
    if is_late and counted:
        many = "counting the model's costs %s; known for %d of its segments"
        log.warning(many, late, len(counted))
    if not counted:
        end = "ran out of memory; free some or raise the limit"
        if is_late:
            end = f"{late}; a smaller model needs less"
        elif status:
            end = f"was killed by signal {-status}, likely for memory; free some or raise the limit"
        raise CapacityError(f"counting the model's costs {end}")
    return tuple(map(measured, ordered(counted)))


def _read_until(reader: int, deadline: float) -> tuple[bytes, bool]:
    """All that comes until the other end is closed, and whether that did not happen in time."""
    content = bytearray()
    with open(reader, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (block := pipe.read(65536)):
                return bytes(content), False
            content += block
    return bytes(content), True


def _count_and_exit(
    writer: int, count: Callable[[], Iterator[SegmentCost]], memory_bytes: int
) -> None:
    """Write a line for each segment as soon as it is counted, and end this forked process. Nothing
    may return into the code of the one that forked it, hence os._exit whatever happens."""
    status = 1
    try:
        process_memory.be_killed_before_others(1000)  # or the trainer loses what was counted
        if memory_bytes:
            process_memory.limit_growth(memory_bytes)
        torch.set_num_threads(1)
        with os.fdopen(writer, "wb") as pipe:
            try:
                with memory_errors("while counting costs"):
                    for cost in count():
                        pipe.write(msgspec.json.encode(cost) + b"\n")
                        pipe.flush()
                status = 0
            except CapacityError:
                status = 0  # what was counted is there, as if this process had been killed
            except Exception as error:  # a user's family may raise anything
                said = str(error) if isinstance(error, EdgeError) else repr(error)
                pipe.write(one_line(said, MAX_LINE).encode())
    finally:
        os._exit(status)
