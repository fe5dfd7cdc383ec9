"""Grids of what pre-trained weights and adapters are worth, over backbones that the product itself
has pre-trained.

    python -m tools.experiments texts --out build/texts
    mkdir build/backbones
    python -m tools.experiments run --grid backbones --data prose=build/texts/prose \
        --data runs=build/backbones --out build/backbones
    python -m tools.experiments run --grid adapt-texts --data code=build/texts/code \
        --data runs=build/backbones --seeds 0,1,2 --out build/adapt-texts

`small` and `large` are llamas over bytes that have learned prose and go on with program text; `vit`
has learned half of the classes of CIFAR-100 and goes on with the other half.
"""

from __future__ import annotations

from tools.experiments.grids import Grid, Setting, settings

# No momentum of the server and no average of globals: what a round itself moves is compared.
PLAIN = "--server-momentum 0 --server-lr 1 --serve last"
PRETRAINED = f"--method fedavg-l --clients 1 --split iid --epochs 1 --logit-adjustment 0 {PLAIN}"
SMALL = "--model llama --exits 2 --option dim=64 --option layers=1"
LARGE = "--model llama --exits 2 --option dim=96 --option layers=2"
VIT = "--model vit --exits 3 --option dim=64 --option layers=1"
PROSE = (
    f"{PRETRAINED} --examples 15000 --test-examples 500 --rounds 2 --batch-size 16"
    " --optimizer adam --lr 0.002 --lr-decay 0.3"
)
CLASSES = (
    f"{PRETRAINED} --rounds 8 --batch-size 32 --optimizer adam --lr 0.002 --lr-decay 0.75"
    " --eval-every 2"
)

IMAGES = (
    "--examples 3000 --test-examples 1000 --epochs 2 --batch-size 16 --rounds 10 --eval-every 2"
    f" {VIT}"
)
VIT_INIT = "--method hypemefed --init @runs/vit/model.safetensors"
IMAGE_ROWS = {
    "scratch": "--method hypemefed --optimizer adam --lr 0.001",
    "init": f"{VIT_INIT} --optimizer adam --lr 0.003",
    "freeze-backbone": f"{VIT_INIT} --freeze backbone --optimizer adam --lr 0.01",
    "lora": f"{VIT_INIT} --adapt lora --adapt-rank 4 --optimizer adam --lr 0.01",
    "dema": f"{VIT_INIT} --adapt dema --adapt-rank 16 --optimizer adam --lr 0.01",
}

# Exits know the bytes already and are frozen too.
LORA = "--adapt lora --adapt-rank 4 --freeze all"
DEMA = "--adapt dema --adapt-rank 16 --freeze all"
LAST_HALF = (
    "--adapt dema --adapt-rank 16 --adapt-from 2"  # exit 1 has no adapter: exits are trained
)
PQ = "--adapt pq-lora --adapt-rank 8 --freeze all"
BOTH = "--method heterotune --backbones @runs/backbones.toml"
ALL_SMALL = f"--method fedavg-l {PLAIN} {SMALL} --init @runs/small/model.safetensors"
TEXTS = "--epochs 1 --batch-size 8 --rounds 4 --eval-every 4 --holdout 0.2 --optimizer adam"
TEXT_ROWS = {
    "frozen": f"{BOTH} {LORA} --share none --lr 1e-9",
    "lora": f"{BOTH} {LORA} --share none --lr 0.01",
    "dema": f"{BOTH} {DEMA} --share none --lr 0.02",
    "dema-shared": f"{BOTH} {DEMA} --share shared --lr 0.02",
    "dema-aligned": f"{BOTH} {DEMA} --share aligned --lr 0.02",
    "full": f"{BOTH} --adapt none --share none --lr 0.002",
    "dema-last-half": f"{BOTH} {LAST_HALF} --share none --lr 0.02",
    "pq-lora": f"{BOTH} {PQ} --share none --lr 0.03",
    "pq-lora-shared": f"{BOTH} {PQ} --share shared --lr 0.03",
    "small-full": f"{ALL_SMALL} --lr 0.002",
    "small-dema": f"{ALL_SMALL} {DEMA} --lr 0.02",
    "small-dema-alone": f"{ALL_SMALL} {DEMA} --lr 0.02 --personalise 4",
}
# As good as untrained by others: one round, of whose step a thousandth is taken.
ALONE = "--rounds 1 --eval-every 1 --participants 1 --server-lr 0.001"

# Memory and bytes where weights count for more than here: one step, for `tools.experiments peaks`.
WIDE = "--method fedavg-l --model llama --exits 2 --option dim=512 --option layers=4"
STEP = "--examples 16 --test-examples 2 --epochs 1 --batch-size 8 --rounds 1 --optimizer adam"
WIDE_ROWS = {
    "full": WIDE,
    "lora": f"{WIDE} {LORA}",
    "lora-query-value": f"{WIDE} {LORA} --adapt-targets attention.q,attention.v",
    "dema": f"{WIDE} {DEMA}",
    "dema-last-half": f"{WIDE} {LAST_HALF}",
    "pq-lora": f"{WIDE} {PQ}",
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
        "a vit that learns half of the classes, for `adapt-images`",
        {"vit": f"{VIT} --run-dir @runs/vit"},
        (Setting("first", "one", "iid", CLASSES),),
    ),
    "adapt-images": Grid(
        "a pre-trained vit on classes that it has not seen",
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
        "two pre-trained llamas on program text, each client a mixture of topics of its own",
        TEXT_ROWS,
        tuple(settings("code", {"two": "--clients 12 --groups 6,6"}, ("subject",), TEXTS)),
        instead={"frozen": "--rounds 1 --eval-every 1", "small-dema-alone": ALONE},
    ),
    "adapt-wide": Grid(
        "memory and bytes of a llama of 25 M weights, for `tools.experiments peaks`",
        WIDE_ROWS,
        tuple(settings("code", {"two": "--clients 2 --groups 0,2"}, ("subject",), STEP)),
    ),
}
