"""`edge-sdk calibrate` and `infer-report`: when to stop, by held-out examples of this device."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from edge_sdk.cli.flags import add_command, number_flag, path_flag, print_step, share_flag
from edge_sdk.cli.infer import add_model_arguments, import_runtime
from edge_sdk.helpers.files import make_folder
from edge_sdk.infer.model_folder import Measure, read_model

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
    wish.add_argument("--accuracy", type=share_flag, metavar="SHARE", help="at least, e.g. 0.85")
    wish.add_argument(
        "--accuracy-loss",
        type=share_flag,
        metavar="SHARE",
        help="at most so much below the deepest exit, e.g. 0.01",
    )
    wish.add_argument(
        "--latency-ms", type=latency, metavar="MS", help="mean of an example, at most"
    )
    parser.add_argument(
        "--measure", choices=get_args(Measure), default="softmax", help="of an exit's confidence"
    )
    parser.set_defaults(run=run_calibrate)


def add_infer_report_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "infer-report",
        "accuracy against latency per threshold, as table and plot",
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
        accuracy=args.accuracy,
        accuracy_loss=args.accuracy_loss,
        latency_s=None if args.latency_ms is None else args.latency_ms / 1e3,
        measure=args.measure,
        threads=args.threads,
    )
    tell_doubts(y, read_model(args.model).spec.num_classes)
    shares = ", ".join(f"{100 * share:.1f}" for share in found.exit_shares)
    thresholds = ", ".join(f"{value:g}" for value in found.thresholds) or "anything"
    print(
        f"{found.wanted}: stop where {found.measure} is at least {thresholds}; on "
        f"{found.num_examples} held-out examples accuracy {100 * found.accuracy:.2f} % (deepest "
        f"exit {100 * found.deepest_accuracy:.2f} %), latency {1e3 * found.latency_s:.3f} ms, "
        f"per exit {shares} %"
    )
    return 0


def tell_doubts(y: Any, num_classes: int) -> None:
    """Why thresholds chosen on these labels may be worth little. y: (n,)."""
    if len(y) < FEW:
        print_step(f"chosen on {len(y)} examples, which is few: give {FEW} or more")
    lacking = sorted(set(range(num_classes)) - set(y.tolist()))
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
