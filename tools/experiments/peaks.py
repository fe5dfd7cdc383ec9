"""`python -m tools.experiments peaks`: what one device of each kind takes, predicted and measured.

    python -m tools.experiments peaks --out build/text --to docs/results --name text-peaks

Of every row of a grid's results, each model that its devices train, whole: a job of the run's plan
in a fresh training process, asked for as the agent does, on as many examples as a client has. MB of
1e6 bytes. predicted, measured: the peak less the process at rest (its `rest`), which has loaded
torch and its kernels; up, down: what a round moves, without what is frozen, which travels once.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coordinator.config import RunConfig
from coordinator.methods.registry import make_method
from edge_sdk.capacity.costs import peak_bytes
from edge_sdk.data.loading import load, save_shard
from edge_sdk.errors import ConfigError
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from tools.bench.memory import one_job
from tools.experiments.tables import (
    Row,
    aligned,
    decimals,
    origins_of,
    read_json,
    read_runs,
    write_table,
)

DIGITS = {"rest": 1, "predicted": 2, "measured": 2, "up": 3, "down": 3}


def add_command(commands: Any) -> None:
    parser = commands.add_parser("peaks", help="memory and bytes of one device of each kind")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--to", type=Path, help="folder for NAME.csv and NAME.md, default --out")
    parser.add_argument("--name", default="peaks", help="of the files, default peaks")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="labels of rows, default all")
    parser.set_defaults(run=run_peaks)


def run_peaks(args: argparse.Namespace) -> int:
    runs = {str(run.cell["label"]): run for run in reversed(read_runs(args.out))}  # a seed of each
    lines: list[Row] = []
    for label in picked(args.only, sorted(runs)):
        run = runs[label]
        name = "-".join(str(run.cell[key]) for key in ("data", "regime", "alpha"))
        content = read_json(args.out / f"{name}-{label}-s{run.cell['seed']}.json")
        lines += [{"label": label} | line for line in lines_of(content["config"])]
    note = f"python -m tools.experiments peaks; {origins_of(runs.values())}"
    cells = [[shown(key, value) for key, value in line.items()] for line in lines]
    text = aligned([list(lines[0]), *cells], is_markdown=True)
    write_table(args.to or args.out, args.name, lines, text, note)
    return 0


def picked(wanted: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    """The wanted rows, or all. Raises ConfigError listing the known ones."""
    if unknown := sorted(set(wanted or ()) - set(known)):
        raise ConfigError(f"there is no row {', '.join(unknown)}; known: {', '.join(known)}")
    return wanted or known


def shown(key: str, value: Any) -> str:
    return decimals(value, DIGITS[key]) if key in DIGITS else str(value)


def lines_of(content: Mapping[str, Any]) -> list[Row]:
    """A line for each model of a run. content: `config` of its results."""
    own = {field.name for field in msgspec.structs.fields(RunConfig)}
    config = msgspec.convert({k: v for k, v in content.items() if k in own}, RunConfig)
    offer = make_method(config).offer()
    _, train, _ = load(config.data)
    count = (config.examples or len(train)) // int(content["clients"])
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shard.npz"
        save_shard(data, train.take(np.arange(len(train))[:: len(train) // count][:count]))
        return [line_of(spec, offer.plan, data) for spec in offer.variants or (offer.model,)]


def line_of(spec: ModelSpec, plan: Plan, data: Path) -> Row:
    whole = Segment(first=1, last=spec.exit)
    done = one_job(spec, msgspec.structs.replace(plan, segments=(whole,)), data)
    return {
        "weights": sum(tensor.numel() for tensor in initial_tensors(spec, 0).values()),
        "rest": done.ready["rss_mb"],
        "predicted": (peak_bytes(done.cost) - done.cost.runtime_bytes) / 1e6,
        "measured": done.peak_mb - done.ready["rss_mb"],
        "up": done.cost.upload_bytes / 1e6,
        "down": done.cost.download_bytes / 1e6,
    }
