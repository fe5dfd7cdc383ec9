"""Presets against the published figures, the command line and the models."""

from __future__ import annotations

import argparse

import pytest
import torch

from coordinator.cli.arguments import RUN, run_config
from coordinator.cli.emulate import add_emulate_command
from coordinator.cohorts.population import group_exits
from coordinator.config import GeneratorOptions
from coordinator.methods.registry import METHODS
from coordinator.presets import PRESETS, find_preset, missing_data
from coordinator.settings import checked, shaped
from edge_sdk.cli.flags import Parser
from edge_sdk.errors import ConfigError
from edge_sdk.models import FAMILIES, build

# Shapes of one example and classes, as the data sets are published
DATA = {
    "unimib": ((3, 151), 8),
    "svhn": ((3, 32, 32), 10),
    "stl10": ((3, 96, 96), 10),
    "cifar100-resnet18": ((3, 32, 32), 100),
    "fashion-10-exits": ((1, 28, 28), 10),
    "prelim": ((1, 28, 28), 10),
}
# batch size, learning rate, its tenth, clients, participants, groups
FIGURES = {
    "unimib": (16, 0.005, 0.0005, 30, 6, (10, 10, 10)),
    "stl10": (32, 0.0005, 0.00005, 50, 10, (17, 17, 16)),
    "svhn": (128, 0.0005, 0.00005, 50, 10, (17, 17, 16)),
}
CHANNELS = {
    "unimib": (64, 128, 256, 512),
    "stl10": (64, 128, 256, 512),
    "svhn": (32, 64, 128, 256),
}


def as_text(value: object) -> str:
    """channels=4,5 of ("channels", (4, 5))."""
    if not isinstance(value, tuple):
        return str(value)
    if isinstance(value[0], int):
        return ",".join(map(str, value))
    key, option = value
    return f"{key}={','.join(map(str, option)) if isinstance(option, tuple) else option}"


def parsed(name: str) -> argparse.Namespace:
    """What the emulate command makes of the preset's flags, given as a person would."""
    parser = Parser()
    add_emulate_command(parser.add_subparsers(dest="command"))
    argv = ["emulate"]
    for destination, value in PRESETS[name].flags.items():
        flag = "--" + destination.replace("_", "-")
        for one in value if isinstance(value, list) else [value]:
            argv += [flag, as_text(one)]
    return parser.parse_args(argv)


def test_every_preset_is_here():
    assert set(PRESETS) == set(DATA)


@pytest.mark.parametrize("name", PRESETS)
def test_flags_are_those_of_the_command_line(name):
    args = vars(parsed(name))
    for destination, value in PRESETS[name].flags.items():
        assert args[destination] == value
        assert type(args[destination]) is type(value)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_hold_together_and_the_model_builds(name):
    args = parsed(name)
    if args.model not in FAMILIES:
        pytest.skip(f"model family {args.model} is not in this version")
    shape, num_classes = DATA[name]
    config = checked(shaped(run_config(args, RUN), shape, num_classes))
    exits = group_exits(args.groups, args.clients, args.exits)
    assert len(exits) == args.clients
    assert set(exits) == set(range(1, args.exits + 1)), "a group for every exit"
    model = build(config.model).eval()
    logits = model(torch.zeros(2, *shape))
    assert [tuple(out.shape) for out in logits] == [(2, num_classes)] * args.exits


@pytest.mark.parametrize("name", FIGURES)
def test_published_figures(name):
    flags = PRESETS[name].flags
    keys = ("batch_size", "lr", "weight_decay", "clients", "participants", "groups")
    assert tuple(flags[key] for key in keys) == FIGURES[name]
    assert (flags["rounds"], flags["epochs"], flags["alpha"]) == (300, 5, 0.5)
    assert flags["optimizer"] == "adam"
    paper = METHODS["hypemefed"].paper
    assert (paper["generator.name"], paper["generator.rank"]) == ("svd-mlp", 100)
    assert GeneratorOptions().hidden == 512
    assert (flags["method"], flags["model"], flags["exits"]) == ("hypemefed", "vgg", 3)
    assert flags["option"] == [("channels", CHANNELS[name]), ("dropout", 0.5)]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # counted from the authors' models; of the 1-D UniMiB model there is no published count
        ("svhn", (106_922, 349_364, 1_245_886)),
        ("stl10", (998_218, 2_253_140, 5_979_486)),
    ],
)
def test_models_have_the_published_sizes(name, sizes):
    args = parsed(name)
    model = build(shaped(run_config(args, RUN), *DATA[name]).model)
    for exit, size in enumerate(sizes, 1):
        parts = [*model.stages[:exit], *model.exits[:exit]]
        assert sum(p.numel() for part in parts for p in part.parameters()) == size


def test_ten_exits_have_five_clients_each():
    flags = PRESETS["fashion-10-exits"].flags
    assert (flags["exits"], flags["clients"], flags["participants"]) == (10, 50, 10)
    assert flags["groups"] == (5,) * 10


def test_preliminary_study_generates_nothing():
    flags = PRESETS["prelim"].flags
    assert (flags["method"], flags["exits"]) == ("owners-mean", 3)


@pytest.mark.parametrize("name", PRESETS)
def test_texts_are_single_lines(name):
    preset = find_preset(name)
    text = missing_data(name, "no/where")
    assert "\n" not in preset.about + text
    for fragment in (f"preset {name}", "'no/where'", preset.folder_hint, "--data"):
        assert fragment in text


def test_missing_data_names_the_files():
    assert "train_32x32.mat" in missing_data("svhn", "digits")
    assert "ufldl.stanford.edu" in missing_data("svhn", "digits")


def test_unknown_preset_lists_the_known():
    for call in (lambda: find_preset("mnist"), lambda: missing_data("mnist", "digits")):
        with pytest.raises(ConfigError, match="'mnist'; known: unimib, svhn, stl10, cifar100-res"):
            call()
