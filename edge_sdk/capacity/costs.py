"""How deep a device can train: predicted memory and time of every segment against its profile.

Counting costs needs torch (capacity/counting.py); choosing by them does not, so the agent can
choose anew whenever its free memory changes. A segment that does not fit as the plan has it is
tried with less memory (`memory_savings`) before it is given up."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
from msgspec.structs import replace

from edge_sdk.errors import CapacityError
from edge_sdk.protocol.messages import DeviceProfile, TensorSpec

# Peak memory of a training step over (saved activations + gradients) where the device was not
# calibrated (training/calibration.py), and the error of what is predicted with it. Our measurement:
# torch 2.13 on x86, VGGs, CNN and ResNet18, batches 8 to 64: 0.96 to 1.09 beside a runtime that
# knows the kernels' scratch. It holds for a trainer started with TRAINER_ENVIRONMENT; without, the
# same jobs took up to 75 MB more: glibc raises its mmap threshold as blocks are freed, and then
# keeps large blocks in a fragmented heap. test_counting_peak.py repeats the measurement.
ALLOWANCE, ERROR = 1.15, 0.15
LEAST_ERROR_BYTES = 2 * 1024**2  # of any prediction: the runtime differs so from start to start
TRAINER_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
FORWARD = 1 / 3  # of layer_s is the forward pass: 0.33 on x86, torch 2.13
MIN_MICRO_BATCH = 8  # BatchNorm's statistics of fewer examples harm more than a deeper exit helps


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of a training step: the bytes that lie in memory then, beside gradients and what a
    job always holds. weight_bytes: the largest tensor whose gradient is made then; a kernel
    reorders it into a copy."""

    fixed_bytes: float = 0.0
    example_bytes: float = 0.0  # for each example that goes through at once
    weight_bytes: int = 0

    def at(self, examples: int, copies: int = 0) -> int:
        """Bytes with so many examples at once and copies of the weight."""
        growing = self.fixed_bytes + self.example_bytes * examples
        return math.ceil(max(0.0, growing)) + copies * self.weight_bytes


class SegmentCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What training stages first..last on one device takes, counted before it is tried."""

    first: int
    last: int
    parameter_bytes: int  # the model with its frozen prefix
    load_bytes: int = 0  # model and received tensors, before training: the latter are then dropped
    gradient_bytes: int
    optimizer_bytes: int  # its state, and the received weights where a proximal term pulls to them
    # The step's moments that may be its peak; recompute_: the same where stages are run again for
    # their gradients; None: nothing to gain.
    moments: tuple[Moment, ...]
    recompute_moments: tuple[Moment, ...] | None = None
    # Features that the frozen prefix makes of all examples, kept over the epochs; 0: none kept, a
    # single epoch has no use for them.
    cache_bytes: int
    # Memory that a trainer needs once it has made a first step: its data included, library pages
    # that no step touches left out, as the kernel drops those.
    runtime_bytes: int
    allowance: float = ALLOWANCE
    error: float = ERROR  # of the predicted peak without runtime, as a share
    batch_size: int = 1
    micro_batch: int = 0  # examples at once, 0: the batch
    recompute: bool = False
    num_layers: float = 0  # of the trained stages and exits
    num_frozen_layers: int = 0
    flops_per_example: float  # forward and backward through the trained stages
    frozen_flops_per_example: float  # forward through the frozen stages; once a job if cached
    recompute_flops_per_example: float = 0.0  # forward through what would be run again
    upload_bytes: int
    download_bytes: int  # without what is frozen, which travels once
    kept_bytes: int = 0  # of that: the frozen tensors that a device keeps from its first job on
    tensors: tuple[TensorSpec, ...] = ()  # of a stage alone and its exit, or of a whole variant
    buffers: tuple[str, ...] = ()  # which of these are no parameters
    teacher: tuple[TensorSpec, ...] = ()  # of the plan's second model
    num_weights: int = 0  # parameters of a variant, one by one


def uncached(cost: SegmentCost) -> SegmentCost:
    """The same segment with its frozen stages run in every epoch instead of once: less memory, more
    time. A prefix stays as it is."""
    return replace(
        cost,
        cache_bytes=0,
        flops_per_example=cost.flops_per_example + cost.frozen_flops_per_example,
        frozen_flops_per_example=0.0,
        num_layers=cost.num_layers + FORWARD * cost.num_frozen_layers,
        num_frozen_layers=0,
    )


def in_model(cost: SegmentCost, deepest: SegmentCost) -> SegmentCost:
    """The same segment in a job whose deepest is another: the weights up to that one lie there."""
    return replace(cost, parameter_bytes=max(cost.parameter_bytes, deepest.parameter_bytes))


def in_parts(cost: SegmentCost, micro_batch: int) -> SegmentCost:
    """The same segment with at most so many examples at once: less memory, more steps of layers."""
    return replace(cost, micro_batch=micro_batch)


def recomputing(cost: SegmentCost) -> SegmentCost:
    """The same segment, its stages run again. Raises CapacityError where that saves nothing."""
    if cost.recompute_moments is None:
        raise CapacityError(f"stages {cost.first}-{cost.last} have nothing to run again")
    return replace(
        cost,
        recompute=True,
        moments=cost.recompute_moments,
        recompute_moments=None,
        flops_per_example=cost.flops_per_example + cost.recompute_flops_per_example,
        num_layers=cost.num_layers * (1 + FORWARD),
    )


def memory_savings(cost: SegmentCost) -> Iterator[SegmentCost]:
    """The segment as it is, then with ever less memory, in the order in which it is tried: without
    kept features; in parts of half the batch, a quarter, ... MIN_MICRO_BATCH; with stages run
    again, and then in parts too."""
    yield cost
    whole = uncached(cost)
    if cost.cache_bytes:
        yield whole
    yield from _parts(whole)
    if cost.recompute_moments is not None:
        again = recomputing(whole)
        yield again
        yield from _parts(again)


def _parts(cost: SegmentCost) -> Iterator[SegmentCost]:
    at_once = examples_at_once(cost)
    while at_once > MIN_MICRO_BATCH:
        at_once = max(MIN_MICRO_BATCH, math.ceil(at_once / 2))
        yield in_parts(cost, at_once)


def examples_at_once(cost: SegmentCost) -> int:
    return cost.micro_batch or cost.batch_size


def peak_bytes(cost: SegmentCost) -> int:
    """Predicted peak of the memory that a trainer needs, see `runtime_bytes`.

    While parts of a batch add up all gradients are there, and each is made a second time, in the
    kernel's order and in ours."""
    held = cost.parameter_bytes + cost.optimizer_bytes + cost.cache_bytes
    at_once = examples_at_once(cost)
    copies = 3 if at_once < cost.batch_size else 1
    step = max(moment.at(at_once, copies) for moment in cost.moments) + cost.gradient_bytes
    return cost.runtime_bytes + max(cost.load_bytes, held + math.ceil(cost.allowance * step))


def least_bytes(cost: SegmentCost) -> int:
    """Predicted peak with all that can be saved."""
    return min(map(peak_bytes, memory_savings(cost)))


def error_bytes(cost: SegmentCost) -> int:
    """By how many bytes the predicted peak may be wrong."""
    return max(LEAST_ERROR_BYTES, math.ceil(cost.error * (peak_bytes(cost) - cost.runtime_bytes)))


def seconds(
    cost: SegmentCost, profile: DeviceProfile, num_examples: int, plan_epochs: int
) -> float:
    """Predicted duration of a job: arithmetic, what its layers cost per step beside that, and its
    transfers where the link is known. For cnn and vgg on an idle x86 machine 0.7 to 1.9 of the
    measured time; arithmetic alone is 0.1 for a cnn on 8 x 8 images (tools/bench/predict.py).

    Raises CapacityError if the profile has no measured compute."""
    flops = plan_epochs * cost.flops_per_example + cost.frozen_flops_per_example
    layers = plan_epochs * cost.num_layers + FORWARD * cost.num_frozen_layers
    compute_s = compute_seconds(num_examples * flops, profile)
    at_once = examples_at_once(cost)
    compute_s += math.ceil(num_examples / at_once) * layers * profile.layer_s
    if profile.link_mbit_s is None:
        return compute_s
    return compute_s + 8 * (cost.upload_bytes + cost.download_bytes) / (profile.link_mbit_s * 1e6)


def compute_seconds(flops: float, profile: DeviceProfile) -> float:
    if profile.gflops <= 0:
        raise CapacityError("this profile has no measured compute; measure it with compute=True")
    return flops / (profile.gflops * 1e9)
