"""A device without a link, for tools/bench/choice.py: chooses with the product's chooser, trains in
the product's trainer process, and prints what happened as one line of JSON.

    python -m tools.bench.limited_device [prepare] < TASK.json

It is as light as an agent: what a job's tensors are was written to files by `prepare`.
"""

from __future__ import annotations

import itertools
import json
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from edge_sdk.agent.pipe import Estimate, Estimated, Inspected, PipeMessage, Train, TrainerOptions
from edge_sdk.agent.trainer_process import TrainerProcess
from edge_sdk.capacity.chooser import Chooser
from edge_sdk.capacity.costs import SegmentCost, memory_savings, peak_bytes
from edge_sdk.hardware.measure import measure
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Fault,
    Fetch,
    Job,
    ModelSpec,
    Part,
    Plan,
    Segment,
    TensorSpec,
    Update,
    Welcome,
)
from edge_sdk.protocol.stream import PART_BYTES, layout, num_parts

BATCHES = 1  # in an epoch; memory is at its peak from the second step on
Segments = list[tuple[int, int]]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """folder: where `prepare` wrote. forced: train these with the levers that need least, instead
    of what is chosen."""

    spec: ModelSpec
    plan: Plan
    folder: str
    calibration: str = ""
    forced: Segments = []
    patience_s: float = 120.0


def prepare(task: Task) -> None:
    """The data, and for all segments that a job may have its tensors' specs and parts."""
    import numpy as np

    from edge_sdk.capacity.counting import segment_costs
    from edge_sdk.data.loading import Examples, save_shard
    from edge_sdk.models import initial_tensors
    from edge_sdk.protocol.tensor_lists import needed_names
    from edge_sdk.protocol.tensors import Sender

    spec, folder = task.spec, Path(task.folder)
    count = BATCHES * task.plan.batch_size
    x = np.random.default_rng(0).standard_normal((count, *spec.input_shape), dtype=np.float32)
    y = np.arange(count) % spec.num_classes
    save_shard(folder / "data.npz", Examples(x, y, spec.num_classes))
    tensors = initial_tensors(spec, 0)
    jobs = [[(1, exit), *deeper] for exit in (1, 2, 3) for deeper in _deeper(exit)]
    jobs += [[(2, 2)], [(3, 3)]]
    for job in jobs:
        segments = [Segment(first=first, last=last) for first, last in job]
        sender = Sender({name: tensors[name] for name in needed_names(tensors, segments)})
        (folder / f"{_name(job)}.json").write_bytes(msgspec.json.encode(sender.specs))
        with (folder / f"{_name(job)}.parts").open("wb") as file:
            for index in range(sender.num_parts):
                file.write(sender.part(index))
    costs = segment_costs(spec, task.plan, count, 0)
    (folder / "costs.json").write_bytes(msgspec.json.encode(costs))


def _deeper(exit: int) -> list[Segments]:
    alone = [(stage, stage) for stage in range(exit + 1, 4)]
    return [list(some) for n in range(len(alone) + 1) for some in itertools.combinations(alone, n)]


def _name(job: Sequence[tuple[int, int]]) -> str:
    return "+".join(f"{first}-{last}" for first, last in job)


class Device:
    def __init__(self, task: Task) -> None:
        self._task = task
        self._deadline = time.monotonic() + task.patience_s
        self._trainer = TrainerProcess(
            TrainerOptions(
                data=f"{task.folder}/data.npz",
                threads=1,
                calibration=task.calibration,
                measure_compute=not list(Path(task.calibration).parent.glob("calibration-*.json")),
            )
        )

    def run(self) -> dict[str, Any]:
        try:
            inspected = self._until(Inspected)
            return self._forced() if self._task.forced else self._chosen(inspected)
        except TimeoutError as error:
            return {"died": str(error)}
        except (EOFError, OSError):
            return {"died": f"the trainer {self._trainer.wait_for_end().how}"}
        finally:
            self._trainer.end()

    def _forced(self) -> dict[str, Any]:
        """The segment with the levers that, by what is counted, need least."""
        content = Path(self._task.folder, "costs.json").read_bytes()
        costs = msgspec.json.decode(content, type=list[SegmentCost])
        cost = next(c for c in costs if [(c.first, c.last)] == self._task.forced)
        least = min(memory_savings(cost), key=peak_bytes)
        plan = replace(self._task.plan, micro_batch=least.micro_batch, recompute=least.recompute)
        return {"peak_bytes": self._train(self._task.forced, plan, least.cache_bytes)}

    def _chosen(self, inspected: Inspected) -> dict[str, Any]:
        task, chooser = self._task, Chooser()
        self._trainer.send(Estimate(model=task.spec, plan=task.plan))
        chooser.costs = self._until(Estimated).costs
        profile = measure(own_bytes=self._trainer.own_bytes(), compute=False)
        welcome = Welcome(
            protocol=PROTOCOL,
            run="0",
            model=task.spec,
            plan=task.plan,
            deadline_s=0.0,
            heartbeat_s=1.0,
        )
        chooser.choose(profile, welcome, inspected.num_examples)
        choice = chooser.choice
        assert choice is not None
        rows = msgspec.to_builtins(choice.rows)
        found = {"available_bytes": profile.memory_available_bytes, "rows": rows, "trained": []}
        if not choice.exit:
            return found
        job = [(1, choice.exit), *((stage, stage) for stage in choice.stages)]
        segments = tuple(Segment(first=first, last=last) for first, last in job)
        plan = chooser.adapted(replace(task.plan, segments=segments))
        peaks = [row.peak_bytes for row in choice.rows if (row.first, row.last) in job]
        found |= {"trained": job, "predicted_bytes": max(peaks)}
        try:
            peak = self._train(job, plan, chooser.cache_bytes(segments))
        except TimeoutError as error:
            return found | {"died": str(error)}
        except (EOFError, OSError):
            return found | {"died": f"the trainer {self._trainer.wait_for_end().how}"}
        return found | {"peak_bytes": peak}

    def _train(self, segments: Segments, plan: Plan, cache_bytes: int) -> int:
        """Measured peak of the job, its update's parts fetched like an agent does."""
        name = Path(self._task.folder, _name(segments))
        specs = msgspec.json.decode(
            name.with_name(f"{name.name}.json").read_bytes(), type=tuple[TensorSpec, ...]
        )
        plan = replace(plan, segments=tuple(Segment(first=f, last=n) for f, n in segments))
        model = replace(self._task.spec, exit=max(last for _, last in segments))
        job = Job(id="0" * 32, round=1, model=model, plan=plan, tensors=specs, deadline_s=0.0)
        self._trainer.send(Train(job=job, run="bench", cache_bytes=cache_bytes))
        with name.with_name(f"{name.name}.parts").open("rb") as file:
            update = self._until(Update, file)
        count = num_parts(layout(update.tensors)[1])
        self._trainer.send(Fetch(round=1, have=0, first=0, count=count))
        for _ in range(count):
            self._until(Part)
        return update.peak_memory_bytes

    def _until(self, kind: type[Any], parts: Any = None) -> Any:
        """The next message of this kind; parts that the trainer asks for are sent meanwhile."""
        while True:
            left = self._deadline - time.monotonic()
            readable, writable, _ = select.select(
                [self._trainer],
                [self._trainer] if self._trainer.has_unsent else [],
                [],
                max(0, left),
            )
            if writable:
                self._trainer.flush()
            if not readable and not writable:
                raise TimeoutError(f"not done after {self._task.patience_s:g} s")
            if not readable:
                continue
            message: PipeMessage
            message, _ = self._trainer.receive()
            if isinstance(message, kind):
                return message
            if isinstance(message, Fault):
                raise TimeoutError(f"the trainer said {message.code}: {message.detail}")
            if isinstance(message, Fetch) and parts:
                for index in range(message.first, message.first + message.count):
                    parts.seek(index * PART_BYTES)
                    self._trainer.send(Part(round=1, index=index), parts.read(PART_BYTES))


def main() -> int:
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    if sys.argv[1:] == ["prepare"]:
        prepare(task)
    else:
        print(json.dumps(Device(task).run()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
