"""`heterofl`: HeteroFL (Diao et al. 2021, arXiv 2010.01264). Each client trains the first channels
of every layer, as many as its width allows; each element is the mean over those who held it.

As published: classes that a client has no example of are left out of its loss, and their classifier
rows out of the mean; BatchNorm goes by the batch in training, and its statistics are those of one
pass over the data; outputs of narrow layers are divided by the width in training; gradients are
clipped to a norm of 1. `--paper` has the settings for CIFAR-10 in IID; of the learning rate the
first, which published code divides by ten after rounds 150 and 250 (here: --lr-decay).

Deviations. Statistics: the published code has the server go over all clients' data with the whole
model before it evaluates; here, where data stays with the clients, each client's pass is over its
own, with what it trained, and they are averaged like weights. Loss: that of all exits together, so
that the exits can be compared; --exit-weights 0,0,1 is the last alone. Weights: by examples, the
published code counts clients alike (--weighting equal, as --paper does). Width: a client has the
one that it holds; with --redraw-widths each of its jobs has one of those up to it, where the
published `dynamic` mode draws from all levels for everybody. The default widths lie closer together
where most devices are: the memory of activations falls with the width, not with its square.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta
from msgspec.structs import replace

from coordinator.config import NotNegative, Options, RunConfig, flag
from coordinator.methods.base import Method
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.width import WITHOUT, PlanRule, WidthAveraging, variants_of
from edge_sdk.protocol.messages import ModelSpec, Plan

Width = Annotated[float, Meta(gt=0, le=1)]
LEVELS = {"own.widths": (0.0625, 0.125, 0.25, 0.5, 1.0)}  # of both publications
PAPER = LEVELS | {
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch_size": 10,
    "epochs": 5,
    "weighting": "equal",
    "server.serve": "last",
}


class WidthOptions(Options, frozen=True, kw_only=True):
    """Of methods that cut by width alone."""

    widths: Annotated[
        tuple[Width, ...],
        Meta(min_length=1, max_length=100),
        flag("shares of the channels, of the models that devices choose among"),
    ] = (0.125, 0.25, 0.5, 0.75, 1.0)
    redraw_widths: Annotated[
        bool, flag("a job has any of the widths up to the one that its client holds")
    ] = False
    static_norm: Annotated[
        bool, flag("BatchNorm by the batch in training, its statistics by a pass at the end")
    ] = True
    scaler: Annotated[bool, flag("divide a narrow layer's outputs by the width in training")] = True
    mask_absent: Annotated[bool, flag("leave out classes that a client has no example of")] = True
    clip_norm: Annotated[NotNegative, flag("the most of a step's gradient, 0: not clipped")] = 1.0

    def plan_rule(self) -> PlanRule:
        def rule(plan: Plan, model: ModelSpec, round: int) -> Plan:
            return replace(
                plan,
                static_norm=self.static_norm,
                scaler="training" if self.scaler else "none",
                mask_absent=self.mask_absent and model.task == "classify",
                clip_norm=self.clip_norm,
            )

        return rule


ON_DEVICE = OnDevice("the widest of --widths", "about w M", "about w^2 K")


@register_method(
    "heterofl", options=WidthOptions, paper=PAPER, without=WITHOUT, on_device=ON_DEVICE
)
def heterofl(config: RunConfig, device: TorchDevice, options: WidthOptions) -> Method:
    """Each client trains the first channels of every layer, as many as it can hold."""
    return WidthAveraging(
        config,
        variants_of(config.model, options.widths),
        options.plan_rule(),
        is_redrawn=options.redraw_widths,
    )
