"""Probes of tools/experiments: what HypeMeFed's Figure 3 shows, measured here.

cka      are the features of the first stage alike, whatever depth is trained above it? Networks cut
         at every exit are trained on the same data, with the exits' joint loss and with the deepest
         exit's alone; linear CKA (Kornblith et al. 2019) of their stage-1 features on held-out
         data. They begin at the same weights, as the devices of a round do; `--start own` gives
         each its own.
weights  the distribution of a deep convolution's weights: trained by its owners, generated for the
         clients that lack it, and random as before training. From a run's folder; the probe trains
         one more round over emulated clients and leaves the run as it is.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from coordinator.aggregation.border import STATE
from coordinator.aggregation.mean import OwnersMean
from coordinator.cli.arguments import REPEATED
from coordinator.cohorts.base import ClientUpdate, Cohort
from coordinator.cohorts.population import Population, emulated_clients
from coordinator.cohorts.sampling import job_seed, sample
from coordinator.config import SPLITS, RunConfig
from coordinator.generators.base import Generator
from coordinator.generators.registry import make_generator
from coordinator.methods.registry import make_method
from coordinator.runs.emulating import emulated_cohort
from coordinator.runs.evaluate import linear_cka
from coordinator.store.store import Store
from edge_sdk.cli.flags import option_flag, whole_numbers_flag
from edge_sdk.data.loading import DataSet, load_dataset
from edge_sdk.errors import ConfigError
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors, with_prefix
from edge_sdk.training.trainer import train
from tools.experiments.figures import COLOURS, pyplot
from tools.experiments.tables import deviation, write_csv

LOSSES = ("joint", "deepest")
BINS = 80
SHOWN = 0.998  # share of the weights within the histogram's range


def add_command(commands: Any) -> None:
    probe = commands.add_parser("probe", help="measurements on models, not on runs")
    kinds = probe.add_subparsers(dest="kind", required=True)
    cka = kinds.add_parser("cka", help="likeness of first-stage features across depths")
    add = cka.add_argument
    add("--data", required=True, help="as of edge-coordinator emulate")
    add("--examples", type=int, help="stratified subset of the training data")
    add("--test-examples", type=int, help="of the held-out data, whose features are compared")
    add("--model", default="cnn")
    add("--exits", type=int, default=3)
    add("--option", type=option_flag, metavar="KEY=VALUE", help="model option", **REPEATED)
    add("--epochs", type=int, default=5)
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=1e-3)
    add("--seeds", type=whole_numbers_flag, default="0,1,2")
    add("--start", choices=("same", "own"), default="same", help="initial weights")
    cka.set_defaults(run=run_cka)
    weights = kinds.add_parser("weights", help="distribution of trained and generated weights")
    add = weights.add_argument
    add("--run-dir", type=Path, required=True, help="a run of edge-coordinator")
    add("--data", help="instead of the run's own")
    add("--tensor", help="name of a convolution, default the deepest")
    add("--rounds", type=int, default=1, help="to go on with before the weights are compared")
    add("--clients", type=int, help="this and the next three: instead of the run's own")
    add("--groups", type=whole_numbers_flag)
    add("--split", choices=SPLITS)
    add("--alpha", type=float)
    weights.set_defaults(run=run_weights)
    for kind in (cka, weights):
        kind.add_argument("--out", type=Path, required=True, help="folder for CSV and PNG")


def run_cka(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    if args.exits < 2:
        raise ConfigError(f"--exits is {args.exits}, expected at least 2: depths are compared")
    rows = []
    for seed in args.seeds:
        data = load_dataset(args.data, seed, args.examples, args.test_examples)
        fits: Any = {"input_shape": data.train.input_shape, "num_classes": data.train.num_classes}
        spec = ModelSpec(family=args.model, exit=args.exits, options=dict(args.option), **fits)
        local: Any = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
        plan = Plan(segments=(Segment(first=1, last=args.exits),), seed=seed, **local)
        rows += cka_rows(spec, plan, data, args.start == "same")
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "cka.csv", rows)
    means = cka_means(rows)
    for (pair, loss), values in means.items():
        sd = deviation(values)
        spread = "" if sd is None else f" ({sd:.3f})"
        print(f"exits {pair}, {loss} loss: CKA {statistics.mean(values):.3f}{spread}")
    draw_cka(args.out / "cka.png", means)
    return 0


def cka_rows(
    spec: ModelSpec, plan: Plan, data: DataSet, is_same_start: bool
) -> list[dict[str, Any]]:
    """One row per loss and pair of depths, a < b."""
    rows = []
    for loss in LOSSES:
        features = {
            exit: first_features(spec, plan, data, exit, loss, is_same_start)
            for exit in range(1, spec.exit + 1)
        }
        rows += [
            {"seed": plan.seed, "loss": loss, "exits": f"{a}-{b}"}
            | {"cka": linear_cka(features[a], features[b])}
            for a, b in itertools.combinations(features, 2)
        ]
    return rows


def first_features(
    spec: ModelSpec, plan: Plan, data: DataSet, exit: int, loss: str, is_same_start: bool
) -> Tensor:
    """Stage-1 features (n, channels, ...) of the test data, after training the prefix to `exit`."""
    part = replace(spec, exit=exit)
    start = initial_tensors(spec, plan.seed if is_same_start else plan.seed + 1000 * exit)
    begun = {name: tensor for name, tensor in start.items() if stage_of(name)[1] <= exit}
    job = replace(
        plan,
        segments=(Segment(first=1, last=exit),),
        exit_weights=() if loss == "joint" else (*[0.0] * (exit - 1), 1.0),
        seed=job_seed(plan.seed, 0, f"cka/{exit}"),
    )
    model = build(part)
    model.load(train(part, job, begun, data.train).tensors)
    model.ready("cpu").eval()
    with torch.no_grad():
        chunks = torch.from_numpy(data.test.x).split(100)
        return torch.cat([model.stages[0](moved(chunk, "cpu")) for chunk in chunks])


def cka_means(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Values over seeds by (pair, loss)."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["exits"], row["loss"]), []).append(row["cka"])
    return dict(sorted(found.items()))


def draw_cka(path: Path, means: Mapping[tuple[str, str], Sequence[float]]) -> None:
    plt = pyplot()
    sheet, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    pairs = list(dict.fromkeys(pair for pair, _ in means))
    names = {"joint": "joint loss of all exits", "deepest": "deepest exit's loss only"}
    for place_of, loss in enumerate(LOSSES):
        values = [means[pair, loss] for pair in pairs]
        ax.bar(
            [x + 0.38 * (place_of - 0.5) for x in range(len(pairs))],
            [statistics.mean(v) for v in values],
            0.36,
            yerr=[deviation(v) or 0.0 for v in values] if len(values[0]) > 1 else None,
            capsize=3,
            color=COLOURS[(4, 1)[place_of]],
            label=names[loss],
        )
    ax.set_xticks(range(len(pairs)), [f"exits {pair.replace('-', ' and ')}" for pair in pairs])
    ax.set_xlabel("networks trained up to")
    ax.set_ylabel("linear CKA of stage-1 features")
    ax.set_ylim(0, 1.05)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    sheet.savefig(path, dpi=120)
    plt.close(sheet)
    print(path)


def run_weights(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    if args.rounds < 1:
        raise ConfigError(f"--rounds is {args.rounds}, expected at least 1")
    config, round, state = opened(args.run_dir)
    config = replace(config, data=args.data or config.data)
    data = load_dataset(config.data, config.seed, config.examples, config.test_examples)
    population = population_of(config, args)
    clients = emulated_clients(population, config, data.train)
    with emulated_cohort(population, config, clients, device=torch.device("cpu")) as cohort:
        weights = compared(config, round, state, cohort, args.rounds, args.tensor)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, values in weights.items():
        print(f"{name}: {values.numel()} weights, sd {float(values.std()):.5f}")
    edges, shares = histogram(weights)
    rows = [
        {"from": float(edges[i]), "to": float(edges[i + 1])}
        | {name: float(share[i]) for name, share in shares.items()}
        for i in range(len(edges) - 1)
    ]
    write_csv(args.out / "weights.csv", rows)
    draw_weights(args.out / "weights.png", edges, shares)
    return 0


def population_of(config: RunConfig, args: argparse.Namespace) -> Population:
    """The run's own clients, or 50 where its were devices, with what the flags change."""
    population = Population(clients=50, groups=(17, 17, 16), split="dirichlet", alpha=0.5)
    if config.population:
        population = msgspec.json.decode(config.population, type=Population)
    given = {name: getattr(args, name) for name in ("clients", "groups", "split", "alpha")}
    return replace(population, **{key: value for key, value in given.items() if value is not None})


def opened(folder: Path) -> tuple[RunConfig, int, Tensors]:
    """A run's settings, the round after its last, and its state."""
    store = Store.open_readonly(folder)
    try:
        state = store.load_checkpoint()
        config, round = store.config, store.next_round()
    finally:
        store.close()
    if state is None:
        raise ConfigError(f"{folder} has no finished round yet; run one first")
    state.pop(STATE, None)  # no method's
    return config, round, state


def compared(
    config: RunConfig,
    round: int,
    state: Tensors,
    cohort: Cohort,
    num_rounds: int,
    tensor: str | None,
) -> dict[str, Tensor]:
    """Weights of one convolution after `num_rounds` more rounds: those of every owner, those made
    for clients that lack it (a generator may give their mean), and those of an untrained model."""
    method = make_method(config)
    method.load_state_dict(state)
    name = tensor or deepest_convolution(method.current())
    if name not in method.current():
        raise ConfigError(f"--tensor {name} is none of the model's: {', '.join(method.current())}")
    generator = generator_of(config, with_prefix(state, "generator/"))
    for at in range(round, round + num_rounds):
        chosen = sample(cohort.clients(), config.participants, seed=config.seed, round=at)
        work = {client.id: method.assign(client, at) for client in chosen}
        updates = [u for u in cohort.train(work, at, 0.0) if isinstance(u, ClientUpdate)]
        made = generated(generator, updates, method.current(), at, config.weighting)
        method.aggregate(at, updates)
    found = {
        "trained": [u.tensors[name] for u in updates if name in u.tensors],
        "generated": [tensors[name] for tensors in made if name in tensors],
        "random": [initial_tensors(config.model, config.seed + 1)[name]],
    }
    if lacking := [kind for kind, tensors in found.items() if not tensors]:
        raise ConfigError(
            f"{name} has no {' and no '.join(lacking)} weights in round {at}; choose a --tensor "
            "that some participants train and others lack"
        )
    return {kind: torch.cat([t.flatten() for t in held]) for kind, held in found.items()}


def generator_of(config: RunConfig, state: Tensors) -> Generator:
    """The run's generator as the run left it, or the paper's from new networks if the run has none.
    With `generated`, all that this file knows of generators."""
    options = config.generator
    if not state:
        print("the run has no generator; svd-mlp is trained from new networks", file=sys.stderr)
        options = replace(options, name="svd-mlp", gain=1.0)
    generator = make_generator(config.model, options, config.seed)
    if generator is None:
        raise ConfigError("a model of one exit has nothing to generate; choose another run")
    if state:
        generator.load_state_dict(state)
    return generator


def generated(
    generator: Generator,
    updates: Sequence[ClientUpdate],
    current: Tensors,
    round: int,
    weighting: str,
) -> list[Tensors]:
    """What the generator makes for clients that lack stages. weighting: of clients, the run's."""
    mean = OwnersMean()
    for update in updates:
        weight = float(update.num_examples) if weighting == "examples" else 1.0
        generator.observe(update, current, weight)
        mean.add_(update.tensors, weight)
    generator.fit(current, round)
    return [tensors for _, tensors in generator.generate(current, mean.result(current))]


def deepest_convolution(tensors: Mapping[str, Tensor]) -> str:
    """The last one of the deepest stage. Raises ConfigError if there is none."""
    convolutions = [n for n, t in tensors.items() if stage_of(n)[0] == "stages" and t.ndim >= 3]
    if not convolutions:
        raise ConfigError("the model has no convolution; choose one of its tensors by --tensor")
    return max(enumerate(convolutions), key=lambda item: (stage_of(item[1])[1], item[0]))[1]


def histogram(weights: Mapping[str, Tensor]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Edges of BINS bins around 0 that hold SHOWN of every kind, and the share of each bin."""
    arrays = {kind: values.double().numpy() for kind, values in weights.items()}
    reach = max(float(np.quantile(np.abs(values), SHOWN)) for values in arrays.values())
    edges = np.linspace(-reach, reach, BINS + 1)
    return edges, {k: np.histogram(v, edges)[0] / v.size for k, v in arrays.items()}


def draw_weights(path: Path, edges: np.ndarray, shares: Mapping[str, np.ndarray]) -> None:
    plt = pyplot()
    sheet, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for (kind, share), colour in zip(
        shares.items(), (COLOURS[4], COLOURS[5], COLOURS[7]), strict=True
    ):
        ax.stairs(100 * share, edges, color=colour, linewidth=1.5, label=kind)
    ax.set_xlabel("weight of the convolution")
    ax.set_ylabel(f"share of weights\n(% per bin, {BINS} bins)")
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    sheet.savefig(path, dpi=120)
    plt.close(sheet)
    print(path)
