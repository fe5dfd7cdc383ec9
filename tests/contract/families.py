"""What every model family is tested with, and its training steps in a process of their own: torch's
native code may crash or hang there, and the tests still tell which family and input it was.

    python -m tests.contract.families resnet18
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest
import torch
from msgspec.structs import replace
from torch.nn.modules.conv import _ConvTransposeNd

from coordinator.aggregation.sliced import cut
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.widths import slice_of
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.training.trainer import train
from tests.support.examples import examples
from tests.support.processes import ROOT

IMAGES = [(1, 28, 28), (3, 32, 32)]
SERIES = [(3, 51), (3, 151)]
CHANNELS = {"channels": (4, 5, 6, 7)}
BLOCKS = {"layers": (2, 1, 1), "dim": 8, "heads": 4, "ffn": 6, "patch": 7}
# Per family: the inputs that it takes, tiny options, and one input that it does not take.
TABLE = {
    "cnn": ([*IMAGES, *SERIES], CHANNELS, (5,)),
    "llama": (SERIES[:1], BLOCKS | {"kv_heads": 2}, (1, 28, 28)),
    "lstm": (SERIES, {"hidden": 5}, (1, 28, 28)),
    "mlp": ([(7,), *IMAGES, *SERIES], {"widths": (6, 5, 4)}, (1, 2, 3, 4)),
    "resnet18": (IMAGES, CHANNELS | {"blocks": (1, 2, 1, 1)}, (3, 51)),
    "transformer": (SERIES[:1], BLOCKS, (1, 28, 28)),
    "vgg": ([*IMAGES, *SERIES], CHANNELS, (5,)),
    "vit": (IMAGES[1:], BLOCKS, (3, 51)),
}
FOLDED = ModelSpec(
    family="vgg", input_shape=(3, 51), num_classes=3, exit=3, options=CHANNELS | {"fold": (9, 16)}
)
SPECS = [
    ModelSpec(family=family, input_shape=shape, num_classes=3, exit=3, options=options)
    for family, (shapes, options, _) in TABLE.items()
    for shape in shapes
]
FACTORISED = [
    replace(spec, rank=0.25)
    for spec in SPECS
    if (spec.family, spec.input_shape) in (("resnet18", (3, 32, 32)), ("cnn", (3, 51)))
]
ALL = [*SPECS, FOLDED, *FACTORISED]
IDS = [
    f"{s.family}-{s.input_shape}-{s.rank}" if s.rank < 1 else f"{s.family}-{s.input_shape}"
    for s in ALL
]
WIDTHS = (0.25, 0.5, 0.75, 1.0)  # of the options in TABLE: 1 to 7 channels
PATIENCE_S = 120.0  # for about 2 s of work, 4 s for all families
# Kernels as on a CPU with AVX2 but no AVX-512; where they do not exist, those of this machine.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def check_trains_apart(family: str) -> None:
    """Fail the test at hand if training this family would end or block the process of all tests."""
    if fault := training_fault(family):
        pytest.fail(fault)


@functools.cache
def training_fault(*families: str, with_avx2: bool = False) -> str:
    """How training these families went wrong in a process of its own; "" if it did not."""
    command = ["-m", "tests.contract.families", *families]
    return fault_apart(command, AVX2 if with_avx2 else {}, PATIENCE_S)


def fault_apart(arguments: Sequence[str], variables: Mapping[str, str], timeout_s: float) -> str:
    """How a Python program went wrong that prints a line before each thing that it does: the signal
    or status that it ended with, or that it still runs, the last line, and its stderr."""
    program = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | variables,
    )
    try:
        said, wrong = program.communicate(timeout=timeout_s)
        status = program.returncode
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        program.kill()
        said, wrong = program.communicate()
        status, how = -1, f"still running after {timeout_s:g} s"
    begun = said.splitlines()[-1:] or ["its start"]
    return f"{how} in {begun[0]}\n{wrong}" if status else ""


def check_slice(spec: ModelSpec, width: float, shift: int, *, is_same: bool = True) -> None:
    """The slices of `spec` are a model of that width, tensor by tensor. is_same: loaded with them
    it gives the whole model's logits, once the whole one hears nothing of the other channels."""
    draws = torch.Generator().manual_seed(0)
    whole, narrow = (build(replace(spec, width=w)).eval() for w in (spec.width, width))
    parts = slice_of(spec, width, shift)
    drawn = {n: torch.rand(t.shape, generator=draws) for n, t in whole.tensors().items()}
    tensors = {n: t.to(whole.tensors()[n].dtype) for n, t in drawn.items()}
    held = cut(tensors, parts)
    assert {n: t.shape for n, t in held.items()} == {
        n: t.shape for n, t in narrow.tensors().items()
    }
    if not is_same:
        return
    for name, tensor in tensors.items():
        layer = whole.get_submodule(name.rpartition(".")[0])
        axis = 0 if isinstance(layer, _ConvTransposeNd) else 1  # of its inputs
        if tensor.ndim > 1 and (kept := parts[name][axis]) is not None:
            deaf = torch.ones(tensor.shape[axis], dtype=torch.bool).index_fill(0, kept, False)
            tensor.index_fill_(axis, deaf.nonzero().flatten(), 0)
    for name, tensor in (held | cut(tensors, parts)).items():
        assert torch.equal(tensor, held[name]), "what is taken away is not what is held"
    whole.load(tensors)
    narrow.load(held)
    x = torch.rand(2, *spec.input_shape, generator=draws)
    for one, other in zip(whole(x), narrow(x), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def main(families: Sequence[str]) -> None:
    """Train each family on every input of TABLE, two steps each, and print the input before."""
    torch.set_num_threads(1)  # as in tests/conftest.py
    plan = Plan(segments=(Segment(first=1, last=3),), batch_size=4)
    for given in ALL:
        for width in WIDTHS if given.family in families else ():
            spec = replace(given, width=width)
            print(
                f"{spec.family} {spec.input_shape} {spec.options} width {width} rank {spec.rank}",
                flush=True,
            )
            train(spec, plan, initial_tensors(spec, 0), examples(8, shape=spec.input_shape))


if __name__ == "__main__":
    main(sys.argv[1:])
