"""What adapters save: memory and bytes of a training job, counted, against training all weights.

    python -m tools.bench.adapters [--batch 16] [--rank 8]

Memory is that of the job beside a trainer's own: weights, gradients, Adam's state, what autograd
saves and the widest tensors of a backward pass. tests/edge_sdk/capacity/test_counting_peak.py
compares such figures with the peaks of real trainers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from edge_sdk.capacity.costs import SegmentCost, peak_bytes, recomputing
from edge_sdk.capacity.counting import each_variant_cost
from edge_sdk.protocol.messages import Adapters, ModelSpec, Plan, Segment
from tools.tables import print_table

SIZE = {"layers": 2, "dim": 256, "heads": 4}
MODELS = {
    "llama": ModelSpec(
        family="llama",
        input_shape=(256,),
        num_classes=256,
        exit=4,
        task="tokens",
        vocabulary=256,
        options=SIZE,
    ),
    "vit": ModelSpec(
        family="vit",
        input_shape=(3, 32, 32),
        num_classes=10,
        exit=4,
        options={**SIZE, "patch": 2},
    ),
}
PARTS = {
    "all weights": None,
    "lora": Adapters(kind="lora"),
    "pq-lora": Adapters(kind="pq-lora"),
    "dema": Adapters(kind="dema"),
    "dema, last half": Adapters(kind="dema", first=3),
}
COLUMNS = (
    "model",
    "trained",
    "weights",
    "kb_up",
    "memory_mb",
    "of_all",
    "again_mb",
    "again_of_all",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=16, help="examples of a step")
    parser.add_argument("--rank", type=int, default=8, help="of adapters")
    args = parser.parse_args(argv)
    print_table(rows(MODELS, args.batch, args.rank), COLUMNS)
    return 0


def rows(models: dict[str, ModelSpec], batch: int, rank: int) -> list[dict[str, Any]]:
    """A row for each model and what of it is trained. again_: with stages run again for their
    gradients; of_all: share of what training all weights takes, as the plan has it."""
    made: list[dict[str, Any]] = []
    for model, spec in models.items():
        whole = 0
        for name, adapters in PARTS.items():
            given = replace(adapters, rank=rank) if adapters else None
            cost = cost_of(replace(spec, adapters=given), batch)
            once = peak_bytes(cost)
            again = peak_bytes(recomputing(cost)) if cost.recompute_moments else once
            whole = whole or once
            row = {
                "model": model,
                "trained": name,
                "weights": f"{cost.gradient_bytes // 4:,}",
                "kb_up": f"{cost.upload_bytes / 1e3:,.0f}",
                "memory_mb": f"{once / 1e6:.0f}",
                "of_all": f"{once / whole:.2f}",
                "again_mb": f"{again / 1e6:.0f}",
                "again_of_all": f"{again / whole:.2f}",
            }
            made.append(row)
    return made


def cost_of(spec: ModelSpec, batch: int) -> SegmentCost:
    """Of training its adapters and exits, or without adapters all, one epoch with Adam."""
    plan = Plan(
        segments=(Segment(first=1, last=spec.exit),),
        batch_size=batch,
        optimizer="adam",
        frozen=("stages",) if spec.adapters else (),
    )
    (cost,) = each_variant_cost([spec], plan, batch, 0, allowance=1.0)
    return replace(cost, allowance=1.0)


if __name__ == "__main__":
    sys.exit(main())
