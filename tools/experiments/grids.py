"""The named grids of tools/experiments, as data: rows (what is compared) x settings (on what).

A row is a label and the flags of `edge-coordinator emulate` that make it; a setting is a data set,
a regime (how many clients reach which exit), a label split and the flags that all rows share. Rows
name every flag they depend on, so that a changed default changes the row `default` only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from coordinator.methods.registry import METHODS

# How clients train in every row that compares rules, and how the default did before `label-skew`
ADAM = "--optimizer adam --lr 0.001 --logit-adjustment 0 --weighting examples"
PLAIN = f"{ADAM} --server-momentum 0 --server-lr 1"
MOMENTUM = f"{ADAM} --server-momentum 0.5 --server-lr 0.75"
REGRESSION = "--generator update-regression --generate all"
DISTILL = "--distill shallow-to-deep --distill-weight 1 --distill-temperature 1 --distill-ramp 10"
FULL_RANK = 4096  # above every matrix side of the models here: nothing is cut off
BASELINE, BOUND = "owners-mean", "fedavg-l"


@dataclass(frozen=True)
class Setting:
    """What all rows of a comparison share. data: a name that --data gives a source for; alpha: the
    Dirichlet alpha as text, or "iid" or "subject"."""

    data: str
    regime: str
    alpha: str
    flags: str


@dataclass(frozen=True)
class Grid:
    """quick: settings for a look at the whole grid in minutes, instead of the others. instead: of
    rows by label, flags that stand against the setting's."""

    about: str
    rows: Mapping[str, str]
    settings: tuple[Setting, ...]
    quick: tuple[Setting, ...] = ()
    instead: Mapping[str, str] = field(default_factory=dict)


def settings(
    data: str, regimes: Mapping[str, str], alphas: Iterable[str], flags: str
) -> list[Setting]:
    """Every alpha with every regime; a regime is the flags that make the population."""
    return [
        Setting(data, regime, alpha, f"{flags} {population} {split_flags(alpha)}")
        for alpha, (regime, population) in itertools.product(alphas, regimes.items())
    ]


def split_flags(alpha: str) -> str:
    return (
        f"--split {alpha}" if alpha in ("iid", "subject") else f"--split dirichlet --alpha {alpha}"
    )


FIFTY = {
    "even": "--clients 50 --groups 17,17,16 --participants 10",
    "skew": "--clients 50 --groups 30,15,5 --participants 10",
}
THIRTY = {"even": "--clients 30 --groups 10,10,10 --participants 6"}
FASHION_FULL = "--epochs 2 --batch-size 32 --rounds 100 --eval-every 20 --eval-tail 5"
FASHION = f"--examples 12000 {FASHION_FULL}"
# enough local steps for BatchNorm's statistics to follow; all of it is small, so every round counts
DIGITS = "--epochs 5 --batch-size 8 --rounds 40 --eval-every 1"
CIFAR = (
    "--model vgg --option channels=16,32,64,128 --examples 10000 --test-examples 2000 --epochs 2"
    " --batch-size 32 --rounds 60 --eval-every 20 --eval-tail 5"
)
UNIMIB = "--epochs 5 --batch-size 16 --rounds 60 --eval-every 20 --eval-tail 5"
UNIMIB_PAPER_MODEL = f"{UNIMIB} --model vgg --option channels=64,128,256,512"

OWNERS = f"--method owners-mean {PLAIN}"
REGRESSION_ROW = f"--method hypemefed {REGRESSION} --rotation off"
ONE, ALL = "--rotation add --rotation-stages 1", "--rotation add --rotation-stages 0"
HALF = f"--method hypemefed {ALL} --holders 0.5 {MOMENTUM}"
ROWS = {
    "fedavg-s": f"--method fedavg-s {PLAIN}",
    "owners-mean": OWNERS,
    "stale-copy": f"--method stale-copy {PLAIN}",
    # --paper serves the last model; the average here too, or `served` would compare two things
    "svd-mlp": "--method hypemefed --paper --serve ema",
    "svd-mlp-residual": "--method hypemefed --generator svd-mlp-residual --generate conv"
    f" --rotation off {PLAIN}",
    "update-regression": f"{REGRESSION_ROW} {PLAIN}",
    "rotation-add": f"--method stage-rotation {ONE} {PLAIN}",
    "rotation-all": f"--method stage-rotation {ALL} {PLAIN}",
    "rotation-replace": f"--method stage-rotation --rotation replace {PLAIN}",
    "owners-mean+momentum": f"--method owners-mean {MOMENTUM}",
    "update-regression+momentum": f"{REGRESSION_ROW} {MOMENTUM}",
    "rotation-add+momentum": f"--method stage-rotation {ONE} {MOMENTUM}",
    "rotation-all+momentum": f"--method stage-rotation {ALL} {MOMENTUM}",
    "rotation-replace+momentum": f"--method stage-rotation --rotation replace {MOMENTUM}",
    "fedavg-l": f"--method fedavg-l {PLAIN}",
    "fedavg-l+momentum": f"--method fedavg-l {MOMENTUM}",
    "rotation-all+momentum+distil": f"--method stage-rotation {ALL} {MOMENTUM} {DISTILL}",
    "rotation-add+momentum+regression": f"--method hypemefed {REGRESSION} {ONE} {MOMENTUM}",
    "rotation-replace+momentum+regression": f"--method hypemefed {REGRESSION} --rotation replace"
    f" {MOMENTUM}",
    "half+rotation-all+momentum": f"{HALF} --generator none",
    "half+rotation-all+momentum+regression": f"{HALF} {REGRESSION}",
    "rotation-add+momentum+needy": f"--method stage-rotation {ONE} --rotation-draw needy"
    f" {MOMENTUM}",
    "default": "--method hypemefed",
    "nobody+default": "--method hypemefed --holders 0",
}


def chosen(labels: str) -> dict[str, str]:
    return {label: ROWS[label] for label in labels.split()}


# Small clients, and what each sets aside; where no flag tells, a method's own defaults count, of
# its local optimizer too. All clients of a group have the memory of that group's prefix.
SMALL = {
    "even": "--clients 30 --groups 10,10,10 --participants 6",
    "skew": "--clients 30 --groups 18,9,3 --participants 6",
}
ZOO = "--holdout 0.2 --eval-every 4 --eval-tail 5"
ZOO_FASHION = f"--examples 4000 --test-examples 2000 --epochs 2 --batch-size 16 --rounds 40 {ZOO}"
ZOO_CIFAR = (
    "--model vgg --option channels=16,32,64,128 --examples 8000 --test-examples 2000 --epochs 2"
    f" --batch-size 16 --rounds 40 {ZOO}"
)
ZOO_UNIMIB = f"--epochs 5 --batch-size 16 --rounds 60 {ZOO}"
ZOO_DIGITS = "--holdout 0.2 --epochs 2 --batch-size 8 --rounds 6 --eval-every 2"
QUICK = {"even": "--clients 12 --groups 4,4,4 --participants 6"}
# Fine-tuned at the end: what a method of models for each client has to beat.
TUNED = ("fedavg-s", "fedavg-l", "owners-mean", "hypemefed")
# The whole model and its initial values fit no group's memory: the last group takes part all the
# same, which is that method at its best, not at equal memory.
BEYOND = {"lotteryfl": " --variants 0,0,1", "mh-pfedhngd": " --variants 1,2,3"}
ZOO_ROWS = {
    name: f"--method {name}" + " --personalise 2" * (name in TUNED) + BEYOND.get(name, "")
    for name in METHODS
    # Parts of hypemefed are in the grid `main`; feddf's server has data that no other one has, and
    # heterotune backbones.
    if name not in ("stale-copy", "stage-rotation", "feddf", "heterotune")
} | {
    "hypemefed-paper": "--method hypemefed --paper",
    "local-only": "--method owners-mean --personalise 16",
}
# As many epochs as 40 rounds of 2 give a client that a fifth of them draw, from a model that is as
# good as untrained: one round of one client, of whose step a thousandth is taken.
ALONE = "--rounds 1 --participants 1 --epochs 1 --server-momentum 0 --server-lr 0.001"

# Clients that all take part in every round, which a hypernetwork needs to learn anything.
PERSONAL = {"all": "--clients 10 --groups 4,3,3"}
PERSONAL_FASHION = (
    "--examples 2000 --test-examples 2000 --epochs 2 --batch-size 16 --rounds 60 --holdout 0.25"
    " --eval-every 4 --eval-tail 5"
)
PERSONAL_ROWS = {
    name: ZOO_ROWS[name]
    for name in ("fedavg-l", "owners-mean", "hypemefed", "pfedhn", "mh-pfedhn", "mh-pfedhngd")
} | {
    "mh-pfedhn-paper": "--method mh-pfedhn --paper",
    "local-only": "--method owners-mean --personalise 120",
}

UNADJUSTED = [
    name
    for name in ZOO_ROWS
    if name in METHODS
    and not METHODS[name].is_personal
    and not METHODS[name].defaults.get("logit_adjustment")
]
# The measures of the default and its bound against label skew: with all, without one, with none.
LABEL_SKEW_ROWS = {
    "default": "--method hypemefed",
    "fedavg-l": "--method fedavg-l",
    "default-none": f"--method hypemefed {MOMENTUM}",
    "fedavg-l-none": f"--method fedavg-l {MOMENTUM}",
    "default-adam": "--method hypemefed --optimizer adam",
    "default-unadjusted": "--method hypemefed --logit-adjustment 0",
    "default-examples": "--method hypemefed --weighting examples",
    "default-plain-server": "--method hypemefed --server-momentum 0 --server-lr 1",
}
STEADY = "--eval-every 2 --eval-tail 5"
STEADY_FASHION = f"--examples 4000 --epochs 2 --batch-size 16 --rounds 50 {STEADY}"
STEADY_CIFAR = (
    "--model vgg --option channels=16,32,64,128 --examples 8000 --test-examples 2000 --epochs 2"
    f" --batch-size 16 --rounds 50 {STEADY}"
)
STEADY_UNIMIB = f"--epochs 5 --batch-size 16 --rounds 50 {STEADY}"

GRIDS = {
    "label-skew": Grid(
        "how fast and steadily the default and its bound learn, for `tools.experiments curves`",
        LABEL_SKEW_ROWS,
        (
            *settings("fashion", {"skew": SMALL["skew"]}, ("0.1", "0.5", "iid"), STEADY_FASHION),
            *settings("cifar", {"skew": SMALL["skew"]}, ("0.1", "0.5", "iid"), STEADY_CIFAR),
            *settings("unimib", {"skew": SMALL["skew"]}, ("0.1", "0.5", "iid"), STEADY_UNIMIB),
        ),
        tuple(
            settings("digits", QUICK, ("0.1",), "--epochs 2 --batch-size 8 --rounds 10 " + STEADY)
        ),
    ),
    "zoo": Grid(
        "every method at one memory of clients, for `tools.experiments zoo`",
        ZOO_ROWS,
        (
            *settings("fashion", SMALL, ("0.5", "0.1"), ZOO_FASHION),
            *settings("cifar", SMALL, ("0.5", "0.1"), ZOO_CIFAR),
            *settings("unimib", SMALL, ("0.5", "0.1"), ZOO_UNIMIB),
        ),
        tuple(settings("digits", QUICK, ("0.5",), ZOO_DIGITS)),
        {"local-only": ALONE},
    ),
    "personal": Grid(
        "models of each client's own against a tuned global one and against learning alone",
        PERSONAL_ROWS,
        tuple(settings("fashion", PERSONAL, ("0.1", "0.5"), PERSONAL_FASHION)),
        tuple(settings("digits", QUICK, ("0.5",), ZOO_DIGITS)),
        {"local-only": ALONE},
    ),
    "adjusted": Grid(
        "the zoo's other methods with logits adjusted to each client's labels",
        {f"{name}+adjusted": f"{ZOO_ROWS[name]} --logit-adjustment 1" for name in UNADJUSTED},
        tuple(settings("fashion", {"skew": SMALL["skew"]}, ("0.1",), ZOO_FASHION)),
        tuple(settings("digits", QUICK, ("0.1",), ZOO_DIGITS)),
    ),
    "main": Grid(
        "every rule, Fashion-MNIST",
        ROWS,
        tuple(settings("fashion", FIFTY, ("0.5", "0.1", "iid"), FASHION)),
    ),
    "digits": Grid(
        "the whole pipeline on the bundled digits, in minutes",
        chosen("fedavg-s owners-mean svd-mlp update-regression rotation-all default fedavg-l"),
        tuple(settings("digits", FIFTY, ("0.5",), DIGITS)),
    ),
    "second": Grid(
        "other data: part of CIFAR-100 with the paper's network at half its width, UniMiB's falls",
        chosen(
            "fedavg-s owners-mean svd-mlp update-regression+momentum rotation-add+momentum"
            " rotation-all+momentum default"
            " fedavg-l fedavg-l+momentum"
        ),
        (
            *settings("unimib", THIRTY, ("0.5", "subject"), UNIMIB),
            *settings("cifar", FIFTY, ("0.5",), CIFAR),
        ),
    ),
    "full": Grid(
        # `default` and `rotation-all+momentum` are the same run where everybody holds every stage
        "the best rows that differ, on all 60,000 images of Fashion-MNIST",
        chosen(
            "owners-mean rotation-add+momentum+regression rotation-all+momentum+distil default"
            " fedavg-l"
        ),
        tuple(settings("fashion", FIFTY, ("0.5",), FASHION_FULL)),
    ),
    "rank": Grid(
        "the paper's table of ranks, with its network: 256 is the full rank of stage 2, 512 of 3",
        chosen("owners-mean")
        | {f"svd-mlp-k{k}": f"{ROWS['svd-mlp']} --rank {k}" for k in (25, 50, 100, 200)}
        | {"svd-mlp-full": f"{ROWS['svd-mlp']} --rank {FULL_RANK}"},
        tuple(settings("unimib", THIRTY, ("0.5",), UNIMIB_PAPER_MODEL)),
    ),
    "alpha": Grid(
        "accuracy against label skew; its cells at 0.1 and 0.5 are those of `main`",
        chosen("fedavg-s owners-mean svd-mlp rotation-all+momentum default fedavg-l"),
        tuple(settings("fashion", {"even": FIFTY["even"]}, ("0.5", "0.1", "1", "1e4"), FASHION)),
    ),
}
