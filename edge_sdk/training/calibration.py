"""The memory calibration of this device: how much memory a training step takes beside what can be
counted. It trains a few small models by the real training loop, takes a second or two, and is
stored for the torch, board, processor, cores and threads that it was made with, in a file of their
own: agents with one home, on one machine or several, neither take nor overwrite each other's.

Peak = runtime + scratch + held + allowance x (saved activations + gradients). Held, saved and
gradients are counted for each model (capacity/counting.py), the rest is measured here."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta

from edge_sdk.capacity.costs import ALLOWANCE, ERROR
from edge_sdk.capacity.counting import of_whole_step
from edge_sdk.data.loading import Examples
from edge_sdk.errors import StoreError
from edge_sdk.hardware import process_memory
from edge_sdk.hardware.boards import board_name, processor
from edge_sdk.hardware.limits import cores, memory
from edge_sdk.helpers.files import sha256_of, write_struct
from edge_sdk.helpers.text import mebibytes
from edge_sdk.models import build, initial_tensors
from edge_sdk.protocol.fields import Struct
from edge_sdk.protocol.messages import (
    ModelSpec,
    Plan,
    Segment,
)
from edge_sdk.training.trainer import train
from edge_sdk.version import __version__

log = logging.getLogger(__name__)
# Kernels' own memory: at least what those of shapes never seen before take; 1 to 5 MB on x86 with
# torch 2.13.
SCRATCH_BYTES = 6 * 1024**2
PROBE_BYTES = 192 * 1024**2  # free memory below which the probes, which take 60 MB, are left out

_CNN = ModelSpec(family="cnn", input_shape=(1, 28, 28), num_classes=10, exit=3)
_VGG = ModelSpec(
    family="vgg",
    input_shape=(3, 18, 25),
    num_classes=10,
    exit=3,
    options={"channels": (16, 32, 64, 128)},
)
PROBES = ((_CNN, 16), (_VGG, 16), (_CNN, 64), (_VGG, 64), (_CNN, 160))


class MemoryCalibration(Struct, frozen=True, kw_only=True):
    """What was measured. made_with: what it holds for, in words. allowance: peak over counted bytes
    of a step. scratch_bytes: beside that, whatever the model. error: of the probes' predictions,
    the largest, as a share of the largest prediction without runtime."""

    made_with: str
    allowance: Annotated[float, Meta(ge=1, le=10)] = ALLOWANCE
    scratch_bytes: Annotated[int, Meta(ge=0, le=2**40)] = SCRATCH_BYTES
    error: Annotated[float, Meta(ge=0, le=1)] = ERROR


def memory_calibration(cache: Path | None, device: str, may_measure: bool) -> MemoryCalibration:
    """The calibration that is stored beside `cache` if one holds here, else a new one, which is
    written there: in a file of that name and a mark of what it was made with.
    Without `may_measure`, memory for it, or on another device than the CPU: what was measured
    elsewhere. A file that cannot be used is replaced."""
    here = made_with(device)
    cache = cache and own_file(cache, here)
    if cache and (found := _read(cache)) and found.made_with == here:
        return found
    probes = list(_probe()) if may_measure and device == "cpu" else []
    if not probes:
        return MemoryCalibration(made_with=here)
    allowance, scratch_bytes, error = fit(probes)
    made = MemoryCalibration(
        made_with=here, allowance=allowance, scratch_bytes=scratch_bytes, error=error
    )
    figures = (allowance, mebibytes(scratch_bytes), 100 * error)
    log.info(
        "calibrated: memory of a step is %.2f of what is counted and %s, within %.0f %%", *figures
    )
    if cache:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_struct(cache, made)
        except (OSError, StoreError) as failed:
            log.warning("calibration not kept, the next start makes it again: %s", failed)
    return made


def made_with(device: str) -> str:
    """What a memory calibration depends on, in words."""
    parts = [f"edge-sdk {__version__}", f"torch {torch.__version__}", *board_name()]
    parts += [processor(), torch.backends.cpu.get_cpu_capability()]  # what kernels are chosen by
    parts += [platform.machine(), f"{cores():g} cores", f"{torch.get_num_threads()} threads"]
    return ", ".join([*parts, device])


def own_file(cache: Path, made_with: str) -> Path:
    """NAME-MARK.json for NAME.json."""
    return cache.with_name(f"{cache.stem}-{sha256_of(made_with.encode())[:12]}{cache.suffix}")


class TrainerBaseline(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer needs here before it has a model; the rest as in MemoryCalibration."""

    runtime_bytes: int
    allowance: float
    error: float


def trainer_baseline(cache: Path | None) -> TrainerBaseline:
    """What this process needs as a trainer; for `edge-sdk plan`, in a process of its own."""
    found = memory_calibration(cache, "cpu", may_measure=True)
    return TrainerBaseline(
        runtime_bytes=runtime_bytes()[0] + found.scratch_bytes,
        allowance=found.allowance,
        error=found.error,
    )


def runtime_bytes() -> tuple[int, int]:
    """What a trainer needs before it has a model: resident memory after a tiny job less library
    pages that no step touches; and of that the library pages. Call it once the data is loaded.

    The first steps load kernels and start threads: 27 MB more than the imports, whatever the model
    (torch 2.13, x86)."""
    _tiny_job()
    idle = process_memory.idle_library_bytes(_tiny_job)
    return process_memory.resident_bytes() - idle, max(0, process_memory.library_bytes() - idle)


def _tiny_job() -> None:
    spec = ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=2, exit=2)
    plan = Plan(segments=(Segment(first=1, last=1), Segment(first=2, last=2)), batch_size=4)
    x = np.zeros((8, *spec.input_shape), dtype=np.float32)
    train(spec, plan, build(spec).tensors(), Examples(x, np.arange(8) % 2, 2))


def fit(probes: Sequence[tuple[int, int]]) -> tuple[float, int, float]:
    """Allowance, scratch bytes and error from pairs of counted and measured bytes: their line of
    least squares, then raised so that no probe lies above it. What is counted is there, so its
    slope is at least 1."""
    counted, measured = np.array(probes, dtype=np.float64).T
    slope = max(1.0, float(np.polyfit(counted, measured, 1)[0])) if len(probes) > 1 else ALLOWANCE
    scratch = max(SCRATCH_BYTES, float((measured - slope * counted).max()))
    predicted = slope * counted + scratch
    return slope, round(scratch), float((predicted - measured).max() / predicted.max())


def _probe() -> Iterator[tuple[int, int]]:
    """Of each probe the counted bytes of a step, and those its job took beside what it holds."""
    if memory()[1] < PROBE_BYTES:
        log.warning("too little free memory to calibrate; figures measured elsewhere are used")
        return
    _tiny_job()
    for spec, batch_size in PROBES:
        shape = spec.input_shape
        plan = Plan(segments=(Segment(first=1, last=3),), batch_size=batch_size, optimizer="adam")
        held, counted = of_whole_step(build(spec), plan, torch.zeros(batch_size, *shape))
        tensors = initial_tensors(spec, 0)
        x = np.zeros((2 * batch_size, *shape), dtype=np.float32)
        examples = Examples(x, np.arange(len(x)) % spec.num_classes, spec.num_classes)
        process_memory.trim()
        received = sum(tensor.nbytes for tensor in tensors.values())  # dropped when training begins
        libraries = process_memory.library_bytes()  # the peak includes what is read for the job
        before = process_memory.resident_bytes() - received
        peak = train(spec, plan, tensors, examples, is_consuming=True).peak_memory_bytes
        if not peak:
            return  # this system does not tell
        yield counted, peak - before - held - (process_memory.library_bytes() - libraries)


def _read(path: Path) -> MemoryCalibration | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=MemoryCalibration)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("calibration %s cannot be used and is made again: %s", path, error)
        return None
