"""`scalefl`: ScaleFL (Ilhan et al. 2023). A client of level l trains the stages up to exit l at the
width of that level, and exit j of them counts j in its loss: sum_j j L_j / (1 + ... + l). Outputs
of narrow layers are divided by the width, also when the model is used. With --gamma exits learn
from the deepest one of the client as well, from a share of the rounds on: L_j is then the cross
entropy and gamma T^2 KL(softmax(z_l / T) || softmax(z_j / T)). `--paper` has the settings for
CIFAR-10; the commands that the authors give for it run without self-distillation, gamma 0. Of the
learning rate it has the first, published code divides it by ten after rounds 100 and 200.

Deviations. The published sub-model of a weak client holds all stages, whose forward pass only stops
early; here it is cut. The teacher is detached, as the term would else pull the deepest exit to the
shallow ones. KL is summed over the classes; the published code averages over them, so that its
gamma of 0.05 is 0.05 / K here. Accuracy is told by exit; the published one is the mean over all
exits. Widths beside the four published levels are ours: the last of these for fewer exits, the
first again for more. Clients count by their examples, alike with --paper.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta
from msgspec.structs import replace

from coordinator.config import NotNegative, Options, Rate, RunConfig, Share, flag
from coordinator.methods.base import Method
from coordinator.methods.heterofl import Width
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.width import WITHOUT, WidthAveraging
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.messages import ModelSpec, Plan

LEVELS = (0.7, 0.7, 0.75, 1.0)  # of ResNet110
PAPER = {
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch_size": 16,
    "epochs": 5,
    "weighting": "equal",
    "server.serve": "last",
}


class ScaleFLOptions(Options, frozen=True, kw_only=True):
    """temperature: T of the softmax; begin: the share of the rounds after which exits learn."""

    widths: Annotated[
        tuple[Width, ...],
        Meta(max_length=100),
        flag("share of the channels of each level, shallow first; default ...,0.7,0.7,0.75,1"),
    ] = ()
    gamma: Annotated[NotNegative, flag("weight of self-distillation, 0: none")] = 0.0
    temperature: Annotated[Rate, flag("of the softmax that is learned", "--gamma-temperature")] = (
        3.0
    )
    begin: Annotated[Share, flag("share of the rounds before it", "--gamma-begin")] = 0.25


@register_method(
    "scalefl",
    options=ScaleFLOptions,
    paper=PAPER,
    without=(*WITHOUT, "distill", "exit_weights"),
    on_device=OnDevice("the deepest level: exit and width", "about w M_e", "about w^2 K_e"),
)
def scalefl(config: RunConfig, device: TorchDevice, options: ScaleFLOptions) -> Method:
    """Each client trains a prefix, and the first channels of its layers.

    Raises ConfigError unless there is a width for each exit, none narrower than the one before."""
    levels = config.model.exit
    widths = options.widths or (LEVELS[0],) * (levels - len(LEVELS)) + LEVELS[-levels:]
    if len(widths) != levels or list(widths) != sorted(widths):
        raise ConfigError(
            f"--widths are {', '.join(f'{w:g}' for w in widths)}, expected one for each of "
            f"{levels} exits, none smaller than the one before"
        )

    def rule(plan: Plan, model: ModelSpec, round: int) -> Plan:
        is_taught = options.gamma and round > options.begin * config.rounds
        return replace(
            plan,
            scaler="always",
            exit_weights=tuple(
                2 * j / (model.exit * (model.exit + 1)) for j in range(1, model.exit + 1)
            ),
            distill="deepest-to-shallow" if is_taught else "none",
            distill_weight=options.gamma if is_taught else 0.0,
            distill_temperature=options.temperature,
        )

    whole = config.model
    variants = [replace(whole, exit=exit, width=w) for exit, w in enumerate(widths, 1)]
    return WidthAveraging(config, tuple(variants), rule)
