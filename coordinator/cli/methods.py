"""`edge-coordinator methods`: every method that `--method` takes, what it does, and what it asks of
a device. Said by the method itself: the docstring and the registration of its function."""

from __future__ import annotations

import argparse
from typing import Any

from coordinator.cli.arguments import add_module_flag
from coordinator.methods.registry import METHODS
from coordinator.registry import Registered
from edge_sdk.cli.flags import add_command
from edge_sdk.helpers.imports import heavy_imports

LEGEND = """
K, M: the weights of the whole model, and the memory to train it, as `fedavg` does, which moves K
down and K up a round; K_e, M_e: of the stages up to the device's exit e; w: share of the channels
or of the rank that the device holds; s: share of the weights that its mask leaves; K_i, M_i: of
the device's own model, whatever it is. personal: a model of its own for each client.
`serve --method NAME --help`: the flags that count with it."""


def add_methods_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "methods",
        "every method: what it does, and what it asks of a device",
        "edge-coordinator methods",
    )
    add_module_flag(parser)
    parser.set_defaults(run=run_methods)


def run_methods(args: argparse.Namespace) -> int:
    with heavy_imports():
        found = {name: METHODS[name] for name in METHODS}
    width = max(map(len, found))
    for name, method in found.items():
        print(f"{name:{width}}  {method.about or 'it does not say'}")
        print(f"{'':{width}}  {needs(method)}")
    print(LEGEND)
    return 0


def needs(method: Registered[Any]) -> str:
    """What it asks of a device, in one line."""
    if (asked := method.on_device) is None:
        return "it does not say what it asks of a device"
    told = f"fits by: {asked.fits}; memory {asked.memory}; traffic {asked.traffic}"
    kept = f"; keeps {asked.keeps}" if asked.keeps != "nothing" else ""
    return told + kept + "; personal" * method.is_personal
