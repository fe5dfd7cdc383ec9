"""`edge-sdk calibrate` and `infer-report`: when to stop, by held-out examples of this device."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from edge_sdk.cli.flags import add_command, number_flag, path_flag, print_step
from edge_sdk.cli.infer import add_model_arguments, import_runtime
from edge_sdk.helpers.files import make_folder
from edge_sdk.infer.model_folder import read_model
from edge_sdk.protocol.fields import Measure

FEW = 100  # held-out examples: a share of them is a step of a per cent


def add_calibrate_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "calibrate",
        "choose an exported model's thresholds on held-out data",
        "edge-sdk calibrate model --data my-data.npz --accuracy-loss 0.01",
    )
    add_model_arguments(parser)
    latency = number_flag(0, 1e9, "milliseconds above 0", is_open=True)
    wish = parser.add_mutually_exclusive_group(required=True)
    metric = number_flag(0, 1e30, "a number of at least 0")
    wish.add_argument(
        "--metric",
        "--accuracy",
        type=metric,
        metavar="VALUE",
        help="of the model's task: accuracy or F1 of at least, e.g. 0.85, RMSE of at most",
    )
    wish.add_argument(
        "--metric-loss",
        "--accuracy-loss",
        type=metric,
        metavar="VALUE",
        help="at most so much worse than the deepest exit, e.g. 0.01",
    )
    wish.add_argument(
        "--latency-ms", type=latency, metavar="MS", help="mean of an example, at most"
    )
    parser.add_argument(
        "--measure", choices=get_args(Measure), help="of an exit's confidence, default the task's"
    )
    parser.set_defaults(run=run_calibrate)


def add_infer_report_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "infer-report",
        "accuracy, or another metric, against latency per threshold, as table and plot",
        "edge-sdk infer-report model --data my-data.npz --out report",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--out", type=path_flag, required=True, help="folder of curve.csv, .md, .png"
    )
    parser.set_defaults(run=run_infer_report)


def run_calibrate(args: argparse.Namespace) -> int:
    import_runtime()
    from edge_sdk.infer.inputs import read_labelled
    from edge_sdk.infer.thresholds import choose_thresholds

    x, y = read_labelled(args.model, args.data, args.skip, args.limit)
    found = choose_thresholds(
        args.model,
        x,
        y,
        metric=args.metric,
        metric_loss=args.metric_loss,
        latency_s=None if args.latency_ms is None else args.latency_ms / 1e3,
        measure=args.measure,
        threads=args.threads,
    )
    model = read_model(args.model)
    tell_doubts(y, model.spec.num_classes if model.spec.task == "classify" else 0)
    value, deepest = (model.metric.said(v, 2) for v in (found.metric, found.deepest_metric))
    shares = ", ".join(f"{100 * share:.1f}" for share in found.exit_shares)
    thresholds = ", ".join(f"{value:g}" for value in found.thresholds) or "anything"
    print(
        f"{found.wanted}: stop where {found.measure} is at least {thresholds}; on "
        f"{found.num_examples} held-out examples {model.metric.name} {value} (deepest "
        f"exit {deepest}), latency {1e3 * found.latency_s:.3f} ms, "
        f"per exit {shares} %"
    )
    return 0


def tell_doubts(y: Any, num_classes: int) -> None:
    """Why thresholds chosen on these labels may be worth little. y: (n,) of classes; num_classes
    0: they are something else."""
    if len(y) < FEW:
        print_step(f"chosen on {len(y)} examples, which is few: give {FEW} or more")
    lacking = sorted(set(range(num_classes)) - set(y.tolist())) if num_classes else []
    if lacking:
        some = ", ".join(map(str, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
        print_step(
            f"chosen without examples of {len(lacking)} of the {num_classes} classes ({some}): "
            "the thresholds know nothing of them; give data that has all classes"
        )


def run_infer_report(args: argparse.Namespace) -> int:
    import_runtime()
    from edge_sdk.infer.early_exit import NEVER, EarlyExit
    from edge_sdk.infer.inputs import read_labelled
    from edge_sdk.infer.report import write_report

    make_folder(args.out, "--out")
    x, y = read_labelled(args.model, args.data, args.skip, args.limit)
    engine = EarlyExit.load(args.model, threads=args.threads, threshold=NEVER)
    about = f"{len(x)} examples of {args.data}"
    for path in write_report(engine, x, y, args.out, about):
        print(path)
    return 0
