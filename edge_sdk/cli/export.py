"""`edge-sdk export`: a trained model as ONNX."""

from __future__ import annotations

import argparse
import os
from typing import Any

from edge_sdk.cli.flags import MAX_EXITS, add_command, add_imports, path_flag, whole_flag
from edge_sdk.errors import UsageError
from edge_sdk.helpers.imports import import_module, require_torch
from edge_sdk.infer.model_folder import described


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
        help="model.safetensors of a run folder, or an exported model's folder",
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

    if os.path.isdir(args.source):  # Path.is_dir raises on what cannot be looked at
        if args.exit is None:
            raise UsageError(f"{args.source} is exported already; give --exit to cut it")
        if args.data:
            raise UsageError(f"--data has no effect with {args.source}, which is exported already")
        model = cut(args.source, args.exit, args.out)
    else:
        from edge_sdk.data.loading import load_test

        examples = load_test(args.data) if args.data else None
        spec, tensors = prefix(*read_weights(args.source), args.exit)
        trained_on = read_trained_on(args.source)
        model = export(spec, tensors, args.out, examples=examples, trained_on=trained_on)
    print(described(model, args.out))
    return 0
