"""The settings of published experiments, as values for the flags of `edge-coordinator emulate`.

Source: HypeMeFed (Shin et al. 2024, arXiv 2407.03086). Where the paper speaks it is followed:
VGG of four blocks with three exits, 300 rounds of 5 epochs with Adam, Dirichlet 0.5, a fifth of the
clients a round. Where it is silent the authors' code is: weight decay 0.1 * lr, dropout 0.5 before
each exit. Not followed: their code tests on a fifth of each client's own data, we on a common test
set. The published method itself is `--paper` (methods/hypemefed.py). Presets give no data;
`missing_data` says which files go where.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """about: one line, what it is and its source; what the source does not give is "our choice".
    folder_hint: which files --data needs and where they are published.
    flags: argparse destination to value; `serve` lacks clients, groups, alpha and split."""

    about: str
    folder_hint: str
    flags: dict[str, object]


COMMON: dict[str, object] = {
    "method": "hypemefed",
    "exits": 3,
    "rounds": 300,
    "participants": 10,  # 20 % of 50
    "clients": 50,
    "groups": (17, 17, 16),
    "split": "dirichlet",
    "alpha": 0.5,
    "epochs": 5,
    "optimizer": "adam",
}
SVHN_TRAINING: dict[str, object] = {"batch_size": 128, "lr": 5e-4, "weight_decay": 5e-5}
SMALL = ("channels", (32, 64, 128, 256))
LARGE = ("channels", (64, 128, 256, 512))
DROPOUT = ("dropout", 0.5)
FASHION_FILES = (
    "a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, plain or .gz, from github.com/zalandoresearch/fashion-mnist"
)

PRESETS: dict[str, Preset] = {
    "unimib": Preset(
        about="UniMiB SHAR falls, HypeMeFed's evaluation settings; a window is a series (3, 151) "
        "for 1-D convolutions here, where the paper folds it into an image of 1 x 3 x 151",
        folder_hint="the path of fall_data.mat with fall_labels.mat beside it, from the data "
        "folder of UniMiB-SHAR.zip, www.sal.disco.unimib.it/technologies/unimib-shar",
        flags=COMMON
        | {
            "model": "vgg",
            "option": [LARGE, DROPOUT],
            "clients": 30,
            "groups": (10, 10, 10),
            "participants": 6,
            "batch_size": 16,
            "lr": 5e-3,
            "weight_decay": 5e-4,
        },
    ),
    "svhn": Preset(
        about="SVHN, HypeMeFed's evaluation settings",
        folder_hint="a folder with train_32x32.mat and test_32x32.mat, the cropped digits "
        "(format 2), from ufldl.stanford.edu/housenumbers",
        flags=COMMON | SVHN_TRAINING | {"model": "vgg", "option": [SMALL, DROPOUT]},
    ),
    "stl10": Preset(
        about="STL-10, HypeMeFed's evaluation settings",
        folder_hint="the folder stl10_binary with train_X.bin, train_y.bin, test_X.bin and "
        "test_y.bin, from stl10_binary.tar.gz, cs.stanford.edu/~acoates/stl10",
        flags=COMMON
        | {
            "model": "vgg",
            "option": [LARGE, DROPOUT],
            "batch_size": 32,
            "lr": 5e-4,
            "weight_decay": 5e-5,
        },
    ),
    "cifar100-resnet18": Preset(
        about="CIFAR-100 with ResNet18, of which our notes of the paper have only the "
        "hypernetworks' memory (44.74 GB without factors, 113.28 MB with); our choice: all "
        "training settings, which are SVHN's, and the three exits",
        folder_hint="the folder cifar-100-binary with train.bin and test.bin, or "
        "cifar-100-python with train and test, from www.cs.toronto.edu/~kriz/cifar.html",
        flags=COMMON | SVHN_TRAINING | {"model": "resnet18"},
    ),
    "fashion-10-exits": Preset(
        about="Fashion-MNIST, 10 exits with 5 of 50 clients each (the paper: 89.47 %, FedAvg-S "
        "85.76 %); our choice: the model cnn, as vgg has at most 6 exits, and SVHN's training",
        folder_hint=FASHION_FILES,
        flags=COMMON | SVHN_TRAINING | {"model": "cnn", "exits": 10, "groups": (5,) * 10},
    ),
    "prelim": Preset(
        about="the preliminary study (Figure 3): groups S, M, L stop at exits 1, 2, 3 and nothing "
        "is generated; our notes have only its similarities of first-layer features; our choice: "
        "Fashion-MNIST, the model's channels, group sizes and SVHN's training",
        folder_hint=FASHION_FILES,
        flags=COMMON
        | SVHN_TRAINING
        | {"method": "owners-mean", "model": "vgg", "option": [SMALL, DROPOUT]},
    ),
}


def find_preset(name: str) -> Preset:
    """Raises ConfigError listing the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def missing_data(name: str, source: str) -> str:
    """The error text for a preset without its data; source: what --data was."""
    return (
        f"preset {name}: got data {source!r}, expected {find_preset(name).folder_hint}; "
        "download it and give its place as --data"
    )
