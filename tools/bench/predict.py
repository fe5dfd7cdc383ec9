"""Predicted against measured training time: CPU seconds of real jobs on one thread.

    python -m tools.bench.predict

Each job trains a prefix for two epochs with the product's trainer, the least of three runs.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from msgspec.structs import replace

from edge_sdk.capacity.costs import seconds
from edge_sdk.capacity.counting import segment_costs
from edge_sdk.data.examples import Examples
from edge_sdk.hardware.speed import measure_gflops, measure_layer_s
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import DeviceProfile, ModelSpec, Plan, Segment
from edge_sdk.training.trainer import train

EPOCHS = 2
WIDE = {"channels": (64, 128, 256, 512)}
# family, input, options, batch size, examples
JOBS = (
    ("cnn", (1, 8, 8), {}, 8, 240),
    ("cnn", (1, 8, 8), {}, 32, 480),
    ("cnn", (1, 28, 28), {}, 32, 480),
    ("vgg", (3, 32, 32), {}, 32, 96),
    ("vgg", (3, 51), WIDE, 16, 160),
)


def main() -> int:
    torch.set_num_threads(1)
    profile = DeviceProfile(
        platform="here",
        memory_total_bytes=0,
        memory_available_bytes=0,
        cores=1.0,
        gflops=measure_gflops(threads=1),
        layer_s=measure_layer_s(threads=1),
    )
    print(f"{profile.gflops:.1f} GFLOPS, {1e6 * profile.layer_s:.0f} us per layer and step")
    print("family  input     batch  exit  measured s  predicted s  ratio  operations alone")
    for family, shape, options, batch_size, count in JOBS:
        data = Examples(
            np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32),
            np.arange(count, dtype=np.int64) % 10,
            10,
        )
        for exit in (1, 3):
            spec = ModelSpec(
                family=family, input_shape=shape, num_classes=10, exit=exit, options=options
            )
            segments = (Segment(first=1, last=exit),)
            plan = Plan(segments=segments, batch_size=batch_size, epochs=EPOCHS)
            costs = segment_costs(spec, plan, count, 0)
            cost = next(c for c in costs if (c.first, c.last) == (1, exit))
            tensors = initial_tensors(spec, 0)
            runs = [train(spec, plan, tensors, data).phases["train"] for _ in range(4)]
            measured_s = min(run.cpu_s or run.wall_s for run in runs[1:])
            predicted_s = seconds(cost, profile, count, EPOCHS)
            alone_s = seconds(cost, replace(profile, layer_s=0.0), count, EPOCHS)
            size = "x".join(map(str, shape))
            print(
                f"{family:6}  {size:8}  {batch_size:5}  {exit:4}  {measured_s:10.3f}  "
                f"{predicted_s:11.3f}  {predicted_s / measured_s:5.2f}  "
                f"{alone_s / measured_s:16.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
