"""The processes that tools/bench/memory.py measures beside the product's own. Each imports only
what its kind needs, does its work once and prints its figures as JSON.

    python -m tools.bench.memory_programs KIND [ARGUMENT ...]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
MODEL, WEIGHTS, SPEC, INPUTS = "model", "model.safetensors", "spec.json", "x.npy"


def footprint(pid: int | str = "self") -> dict[str, float]:
    """A process's memory now and its peak since its program began (or the last reset), in MB of
    1e6 bytes. rss counts pages shared with other processes whole, pss by their share, uss not."""
    status = _fields(Path(f"/proc/{pid}/status"))
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup"))
    return {
        "rss_mb": status["VmRSS"],
        "pss_mb": rollup["Pss"],
        "uss_mb": rollup["Private_Clean"] + rollup["Private_Dirty"],
        "peak_mb": status["VmHWM"],
    }


def _fields(path: Path) -> dict[str, float]:
    """The lines "Name: 12 kB" of a file in /proc, in MB."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 / 1e6 for line in lines if line[2:] == ["kB"]}


def import_torch() -> Figures:
    import torch  # noqa: F401

    return {"start_cpu_s": time.process_time()}


def optim_loop(spec_json: str, plan_json: str, data: str) -> Figures:
    """What one would write without edge_sdk: the same model, batches and loss, torch.optim.Adam.
    Its start ends when the optimizer is there."""
    import msgspec
    import numpy as np
    import torch
    from torch.nn import functional

    from edge_sdk.models import build, initial_tensors
    from edge_sdk.protocol.messages import ModelSpec, Plan

    torch.set_num_threads(1)
    plan = msgspec.json.decode(plan_json, type=Plan)
    spec = msgspec.json.decode(spec_json, type=ModelSpec)
    model = build(spec)
    model.load(initial_tensors(spec, 0))
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.lr)
    with np.load(data) as arrays:
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    start_cpu_s = time.process_time()
    order = torch.Generator().manual_seed(plan.seed)
    losses = torch.zeros(spec.exit)
    model.train()
    for batch in torch.randperm(len(y), generator=order).split(plan.batch_size):
        terms = [functional.cross_entropy(logits, y[batch]) for logits in model(x[batch])]
        optimizer.zero_grad()
        sum(terms, torch.zeros(())).backward()
        optimizer.step()
        losses += torch.stack(terms).detach() * len(batch) / len(y)
    return {"start_cpu_s": start_cpu_s, "losses": losses.tolist()}


def read_inputs(folder: str) -> Figures:
    """What numpy and the inputs take in any of those below."""
    import numpy as np

    np.load(Path(folder) / INPUTS)
    return {"start_cpu_s": time.process_time()}


def predict_onnx(folder: str) -> Figures:
    """edge_sdk.infer, every example through all stages."""
    import numpy as np

    from edge_sdk.infer.early_exit import NEVER, EarlyExit

    engine = EarlyExit.load(Path(folder) / MODEL, threads=1, threshold=NEVER)
    return _each(np.load(Path(folder) / INPUTS), lambda x: engine.predict(x).label)


def predict_torch(folder: str) -> Figures:
    """The same model by torch."""
    import msgspec
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from edge_sdk.models import build
    from edge_sdk.protocol.messages import ModelSpec

    torch.set_num_threads(1)
    model = build(msgspec.json.decode((Path(folder) / SPEC).read_bytes(), type=ModelSpec))
    model.load(load_file(Path(folder) / WEIGHTS))
    model.eval()
    with torch.inference_mode():
        return _each(
            np.load(Path(folder) / INPUTS),
            lambda x: model(torch.from_numpy(x))[-1].argmax(1).numpy(),
        )


def _each(x: Any, predict: Callable[[Any], Any]) -> Figures:
    """Predict one by one. The start ends with the first prediction; cpu_ms is of the others."""
    labels = [int(predict(x[:1])[0])]
    start_cpu_s, times_s = time.process_time(), []
    for number in range(1, len(x)):
        begin = time.process_time()
        labels.append(int(predict(x[number : number + 1])[0]))
        times_s.append(time.process_time() - begin)
    return {
        "start_cpu_s": start_cpu_s,
        "cpu_ms": 1e3 * statistics.median(times_s),
        "labels": labels,
    }


PROGRAMS: dict[str, Callable[..., Figures]] = {
    "import torch": import_torch,
    "torch.optim loop": optim_loop,
    "numpy only": read_inputs,
    "edge_sdk.infer, onnxruntime": predict_onnx,
    "torch": predict_torch,
}


if __name__ == "__main__":
    found = PROGRAMS[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(found | footprint()))
