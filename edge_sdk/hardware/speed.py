"""How fast this machine trains: floating point operations and small layers a second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edge_sdk.hardware.limits import cores

if TYPE_CHECKING:
    from torch import Tensor, nn

SPEED_S = 0.5  # of sampling GFLOPS
LAYER_STEPS, LAYER_S = 50, 0.25  # sampled for layer_s: so many, or as many as that time allows
LEAST_LAYER_STEPS = 9


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes on `count` threads of the CPU within."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_gflops(
    seconds: float = SPEED_S, threads: int | None = None, device: str = "cpu"
) -> float:
    """Sustained float32 training throughput of torch's `device`, 1e9 operations per second.

    Real forward and backward passes of three 3x3 convolutions of 32 channels on (8, 32, 32, 32),
    about 10 MB; an operation is a multiply or an add, and a backward pass counts as two forward
    ones. threads: None = all cores allowed. The median of samples of at least 0.1 s: one period of
    the kernel's CPU quota, so that a throttled group is not taken for its unthrottled moments."""
    import torch

    batch, channels, size, layers = 8, 32, 32, 3
    step_flops = 3 * 2 * layers * batch * channels * channels * 9 * size * size
    with torch_threads(threads or max(1, math.ceil(cores()))):
        convolutions = [torch.nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)]
        stack = torch.nn.Sequential(*convolutions).to(device)
        # The input asks for its gradient: else the first layer does two thirds of what is counted.
        images = torch.ones(batch, channels, size, size, device=device, requires_grad=True)
        _steps_per_s(stack, images, at_least_s=0.0)  # warm up
        samples: list[float] = []
        end = time.monotonic() + seconds
        while not samples or time.monotonic() < end:
            samples.append(_steps_per_s(stack, images, at_least_s=0.1) * step_flops / 1e9)
    return statistics.median(samples)


def measure_layer_s(threads: int | None = None, device: str = "cpu") -> float:
    """Seconds that a layer costs per training step beside its arithmetic: forward and backward of
    24 layers (convolution, BatchNorm, ReLU) on inputs of 64 values, the median of 50 steps.

    Fewer where they take long: where other programs keep the cores busy torch's threads wait for
    each other at every layer, computing all the while."""
    import torch

    blocks = 8
    with torch_threads(threads or max(1, math.ceil(cores()))):
        layers: list[nn.Module] = []
        for _ in range(blocks):
            conv = torch.nn.Conv2d(2, 2, 3, padding=1)
            layers += [conv, torch.nn.BatchNorm2d(2), torch.nn.ReLU()]
        stack = torch.nn.Sequential(*layers).to(device)
        images = torch.ones(2, 2, 4, 4, device=device, requires_grad=True)
        _steps_per_s(stack, images, at_least_s=0.0)  # warm up
        samples: list[float] = []
        end = time.monotonic() + LAYER_S
        while len(samples) < LAYER_STEPS and (
            len(samples) < LEAST_LAYER_STEPS or time.monotonic() < end
        ):
            samples.append(1 / _steps_per_s(stack, images, at_least_s=0.0))
    return statistics.median(samples) / (3 * blocks)


def _steps_per_s(stack: nn.Module, images: Tensor, at_least_s: float) -> float:
    import torch

    start, num_steps, elapsed_s = time.monotonic(), 0, 0.0
    while not num_steps or elapsed_s < at_least_s:
        stack(images).sum().backward()
        if images.is_cuda:
            torch.cuda.synchronize()
        num_steps += 1
        elapsed_s = time.monotonic() - start
    return num_steps / elapsed_s
