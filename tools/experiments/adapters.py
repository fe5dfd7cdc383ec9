"""Grids of what pre-trained weights and adapters are worth, over backbones that the product itself
has pre-trained.

    python -m tools.experiments texts --out build/texts
    mkdir build/backbones
    python -m tools.experiments run --grid backbones --data prose=build/texts/prose \
        --data runs=build/backbones --out build/backbones
    python -m tools.experiments run --grid adapt-texts --data code=build/texts/code \
        --data runs=build/backbones --seeds 0,1,2 --out build/adapt-texts

`small` and `large` are llamas over bytes that have learned prose and go on with program text; `vgg`
has learned half of the classes of CIFAR-100 and goes on with the other half.
"""

from __future__ import annotations

from tools.experiments.grids import Grid, Setting, settings

# No momentum of the server and no average of globals: what a round itself moves is compared.
PLAIN = "--server-momentum 0 --server-lr 1 --serve last"
PRETRAINED = f"--method fedavg-l --clients 1 --split iid --epochs 1 --logit-adjustment 0 {PLAIN}"
SMALL = "--model llama --exits 2 --option dim=64 --option layers=1"
LARGE = "--model llama --exits 2 --option dim=96 --option layers=2"
VGG = "--model vgg --exits 3 --option channels=16,32,64,128"
PROSE = (
    f"{PRETRAINED} --examples 15000 --test-examples 500 --rounds 2 --batch-size 16"
    " --optimizer adam --lr 0.002 --lr-decay 0.3"
)
CLASSES = f"{PRETRAINED} --rounds 3 --batch-size 32 --lr 0.03 --lr-decay 0.5 --eval-every 1"

IMAGES = (
    "--examples 3000 --test-examples 1000 --epochs 1 --batch-size 16 --rounds 12 --eval-every 3"
    f" {VGG}"
)
IMAGE_ROWS = {
    "scratch": "--method hypemefed",
    "init": "--method hypemefed --init @runs/vgg/model.safetensors",
    "frozen-backbone": "--method hypemefed --init @runs/vgg/model.safetensors --freeze backbone",
}
TEXTS = "--epochs 1 --batch-size 8 --rounds 4 --eval-every 4 --optimizer adam"
TEXT_ROWS = {
    "full-small": f"--method fedavg-l {SMALL} --init @runs/small/model.safetensors --lr 0.001",
}
GRIDS = {
    "backbones": Grid(
        "llamas that learn prose, for `adapt-texts`",
        {
            "small": f"{SMALL} --run-dir @runs/small",
            "large": f"{LARGE} --run-dir @runs/large",
        },
        (Setting("prose", "one", "iid", PROSE),),
    ),
    "image-backbone": Grid(
        "a VGG that learns half of the classes, for `adapt-images`",
        {"vgg": f"{VGG} --run-dir @runs/vgg"},
        (Setting("first", "one", "iid", CLASSES),),
    ),
    "adapt-images": Grid(
        "a pre-trained VGG on classes that it has not seen",
        IMAGE_ROWS,
        tuple(
            settings(
                "second",
                {"skew": "--clients 30 --groups 18,9,3 --participants 6"},
                ("0.5",),
                IMAGES,
            )
        ),
    ),
    "adapt-texts": Grid(
        "two pre-trained llamas on program text",
        TEXT_ROWS,
        tuple(settings("code", {"two": "--clients 12 --groups 6,6"}, ("subject",), TEXTS)),
    ),
}
