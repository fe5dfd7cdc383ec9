"""`edge-sdk export`: a trained model as ONNX."""

from __future__ import annotations

import argparse
import os
from typing import Any

from edge_sdk.cli.flags import MAX_EXITS, add_command, add_imports, path_flag, whole_flag
from edge_sdk.errors import UsageError
from edge_sdk.helpers.imports import import_module, require_torch
from edge_sdk.infer.model_folder import described

STATE = "state"  # of the folder in which a device keeps its updates, as in training/saved_update.py


def add_export_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        "a trained model, or its first exits, as ONNX",
        "edge-sdk export runs/first/model.safetensors --out model --exit 2",
    )
    add = parser.add_argument
    add(
        "source",
        type=path_flag,
        help="model.safetensors of a run folder, an exported model's folder, or a device's folder, "
        "for a model of its own: ~/.cache/edge-sdk/updates/ID-...",
    )
    add("--out", type=path_flag, required=True, help="folder to write")
    add("--exit", type=whole_flag(1, MAX_EXITS), help="deepest exit to keep, default all")
    add("--data", help="real examples to check it on, default random inputs; not for a folder")
    add_imports(parser)
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    require_torch("edge-sdk export")
    for module in args.imports or ():
        import_module(module)
    from edge_sdk.infer.export import cut, export, prefix, read_trained_on, read_weights

    if os.path.isdir(args.source / STATE):  # Path.is_dir raises on what cannot be looked at
        from edge_sdk.training.own_model import read_own_model

        note, tensors = read_own_model(args.source)
        spec, trained_on = note.spec, note.data
    elif os.path.isdir(args.source):
        if args.exit is None:
            raise UsageError(f"{args.source} is exported already; give --exit to cut it")
        if args.data:
            raise UsageError(f"--data has no effect with {args.source}, which is exported already")
        model = cut(args.source, args.exit, args.out)
        print(described(model, args.out))
        return 0
    else:
        spec, tensors = read_weights(args.source)
        trained_on = read_trained_on(args.source)
    from edge_sdk.data.loading import load_test

    examples = load_test(args.data) if args.data else None
    part = prefix(spec, tensors, args.exit)
    model = export(*part, args.out, examples=examples, trained_on=trained_on)
    print(described(model, args.out))
    return 0
