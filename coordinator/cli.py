"""`edge-coordinator`: the coordinator's command line. Values are checked here, once."""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coordinator.config import GeneratorOptions, RunConfig, ServerOptions, checked
from coordinator.emulate import SPLITS, emulate, group_exits, split_shards, write_json
from coordinator.methods import METHODS
from coordinator.rounds import RoundReport
from coordinator.store import Store
from edge_sdk.data import DataSet, load_dataset
from edge_sdk.errors import ConfigError, EdgeError
from edge_sdk.wire import ModelSpec


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="edge-coordinator", description="Federated learning over unequal devices."
    )
    parser.add_argument("--debug", action="store_true", help="log everything, show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)
    add_emulate_command(commands)
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        for module in getattr(args, "imports", []):
            importlib.import_module(module)
        return int(args.run(args))
    except EdgeError as error:
        if args.debug:
            raise
        print(f"edge-coordinator: {error}", file=sys.stderr)
        return 1


def add_emulate_command(commands: Any) -> None:
    parser = commands.add_parser("emulate", help="run the rounds over clients in this process")
    add_run_arguments(parser)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--groups", default="17,17,16", help="clients per exit, shallow first")
    parser.add_argument("--alpha", type=float, default=0.5, help="Dirichlet label skew")
    parser.add_argument("--split", choices=SPLITS, default="dirichlet")
    parser.add_argument("--out", type=Path, help="write the rounds as JSON here")
    parser.set_defaults(run=run_emulate)


def run_emulate(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    data = load_dataset(args.data, args.seed, args.examples, args.test_examples)
    config = run_config(args, data)
    groups = whole_numbers(args.groups, "--groups")
    exits = group_exits(groups, args.clients, config.model.exit)
    shards = split_shards(
        data.train, args.clients, split=args.split, alpha=args.alpha, seed=args.seed
    )
    setting = {
        "clients": args.clients,
        "groups": groups,
        "alpha": args.alpha,
        "split": args.split,
    }
    with tempfile.TemporaryDirectory() as scratch, stop_signals() as stopping:
        folder = args.run_dir or Path(scratch) / "run"
        store = open_store(folder, config, "emulate", args.resume)
        try:
            emulate(
                store, data, shards, exits,
                device=device, should_stop=lambda: bool(stopping), report=print_round,
            )  # fmt: skip
            if args.out:
                write_json(store, setting, args.out)
        finally:
            store.close()
    return 0


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every way of running shares: the method, the model, the training, the run folder."""
    add = parser.add_argument
    add("--method", default="hypemefed", choices=sorted(METHODS))
    add("--data", default="digits", help="digits, a folder or a file; the test set comes from it")
    add("--rounds", type=int, default=20)
    add("--participants", type=int, help="clients per round, default all")
    add("--seed", type=int, default=0)
    add("--model", default="cnn", help="model family")
    add("--exits", type=int, default=3, help="number of exits of the whole model")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="model option")
    add("--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="Python module that registers your model families")  # fmt: skip
    add("--epochs", type=int, default=2, help="local epochs")
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=1e-3)
    add("--optimizer", choices=("adam", "sgd"), default="adam")
    add("--momentum", type=float, default=0.0, help="of local SGD")
    add("--examples", type=int, help="use a stratified subset of the training data")
    add("--test-examples", type=int, help="use a stratified subset of the test data")
    add("--eval-every", type=int, default=1)
    server, generator = ServerOptions(), GeneratorOptions()
    add("--server-momentum", type=float, default=server.momentum)
    add("--server-lr", type=float, default=server.lr)
    add("--ema", type=float, default=server.ema, help="decay of the served average")
    add("--serve", choices=("ema", "last"), default=server.serve)
    add("--gain", type=float, default=generator.gain, help="weight of generated tensors, 0 to 1")
    add("--rank", type=int, default=generator.rank)
    add("--hidden", type=int, default=generator.hidden)
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--threads", type=int, default=1, help="torch threads on the CPU")
    add("--run-dir", type=Path, help="where the run lives")
    add("--resume", action="store_true", help="go on with the run in --run-dir")


def run_config(args: argparse.Namespace, data: DataSet) -> RunConfig:
    """The run's settings from the command line. Raises ConfigError."""
    model = ModelSpec(
        family=args.model,
        input_shape=tuple(data.train.input_shape),
        num_classes=data.train.num_classes,
        exit=args.exits,
        options=model_options(args.option),
    )
    server = ServerOptions(
        momentum=args.server_momentum, lr=args.server_lr, ema=args.ema, serve=args.serve
    )
    generator = GeneratorOptions(gain=args.gain, rank=args.rank, hidden=args.hidden)
    return checked(
        RunConfig(
            method=args.method,
            model=model,
            data=str(args.data),
            rounds=args.rounds,
            participants=args.participants,
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            optimizer=args.optimizer,
            momentum=args.momentum,
            seed=args.seed,
            eval_every=args.eval_every,
            examples=args.examples,
            test_examples=args.test_examples,
            server=server,
            generator=generator,
        )
    )


def open_store(folder: Path, config: RunConfig, kind: str, resume: bool) -> Store:
    """A new run, or with `resume` the one there, which must have the same settings."""
    if not resume:
        return Store.create(folder, config, kind)
    store = Store.resume(folder)
    same = store.config.to_json() == config.to_json()
    if not same:
        store.close()
        raise ConfigError(
            f"{folder} was started with other settings; resume with the same flags: "
            f"{store.config.to_json()}"
        )
    return store


def model_options(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts: whole numbers, comma lists of them, numbers, true/false, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals and text):
            raise ConfigError(f"--option {pair!r} is not KEY=VALUE, e.g. channels=32,64,128")
        options[key] = _value(text)
    return options


def _value(text: str) -> int | float | str | bool | tuple[int, ...]:
    if text in ("true", "false"):
        return text == "true"
    if "," in text:
        return tuple(whole_numbers(text, "--option"))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def whole_numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"{flag} {text!r} is not whole numbers with commas, e.g. 4,4,2"
        ) from error


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use auto or cpu")
    return device


@contextmanager
def stop_signals():  # type: ignore[no-untyped-def]
    """A list that gets an entry when SIGTERM or SIGINT arrives; a second SIGINT interrupts."""
    stopping: list[int] = []

    def note(number: int, frame: object) -> None:
        if stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_round(report: RoundReport) -> None:
    """One progress line."""
    totals = report.totals
    last = " / ".join(f"{100 * share:.1f}" for share in report.accuracy) or "-"
    served = " / ".join(f"{100 * share:.1f}" for share in report.accuracy_served) or "-"
    print(
        f"round {report.round}: {totals.returned} of {totals.chosen} returned, "
        f"accuracy per exit {last} %, served {served} %, {totals.wall_s:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
