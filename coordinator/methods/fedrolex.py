"""`fedrolex`: FedRolex (Alam et al. 2022, arXiv 2212.01548). As HeteroFL, but the channels that a
narrow model holds are a window that moves by one channel each round and begins anew after the last,
so that every channel is trained, also where nobody holds the whole model.

The window has the same shift in all layers: those of as many channels have the same window, which
an identity shortcut needs. `--paper` has the settings for CIFAR-10; of the learning rate the first,
which published code divides by four after rounds 800 and 1200 (here: --lr-decay).

Deviations. The published code weighs updates by a counter that it restores within its loop over the
tensors, so from the second tensor on a client counts as often as its place in the list says; its
`--overlap` draws windows for each layer on its own, so shortcuts add unlike channels. Here it is
the plain mean over owners, and there is no overlap. Widths and training go as in heterofl.py, whose
deviations hold here too.

A group of C channels is covered by a width p for pC rounds, then not for (1 - p)C of them: with few
rounds prefer heterofl.
"""

from __future__ import annotations

from coordinator.config import RunConfig
from coordinator.methods.base import Method
from coordinator.methods.heterofl import LEVELS, ON_DEVICE, WidthOptions
from coordinator.methods.registry import TorchDevice, register_method
from coordinator.methods.width import WITHOUT, WidthAveraging, variants_of

PAPER = LEVELS | {
    "optimizer": "sgd",
    "lr": 2e-4,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "batch_size": 10,
    "epochs": 1,
    "weighting": "equal",
    "server.serve": "last",
}


@register_method(
    "fedrolex", options=WidthOptions, paper=PAPER, without=WITHOUT, on_device=ON_DEVICE
)
def fedrolex(config: RunConfig, device: TorchDevice, options: WidthOptions) -> Method:
    """As heterofl, of channels that move on by one in each round."""
    variants = variants_of(config.model, options.widths)
    return WidthAveraging(
        config,
        variants,
        options.plan_rule(),
        lambda round: round - 1,
        is_redrawn=options.redraw_widths,
    )
