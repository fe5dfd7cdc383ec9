"""`feddyn`: FedDyn (Acar et al. 2021, arXiv 2111.04263). A client minimises its loss less <g_i, w>
plus alpha/2 |w - w_received|^2 and then takes g_i - alpha (w - w_received), which stays on the
device (a plan's dyn_alpha). The server keeps h, zero at first:

    h <- h - alpha |S| / N mean(w_i - w),   w <- mean(w_i) - h / alpha

over parameters; statistics of BatchNorm follow the mean. Here each client trains the prefix to its
exit, so h is one per tensor, over those who own it: S and N count owners (N: those that are known,
server_rule.KnownClients). With --weighting examples shares of clients are shares of examples.
h moves by what counted, so for less by updates that came late or were clipped, while their clients
took the whole of their movement into g_i: with either h is no longer the mean of the g_i."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta
from torch import Tensor

from coordinator.aggregation.mean import Kernel
from coordinator.cohorts.base import ClientUpdate
from coordinator.config import Options, RunConfig, flag
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import rotation
from coordinator.methods.server_rule import Kept, state_of
from edge_sdk.protocol.tensors import Tensors

DEFAULTS = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "weighting": "equal"}
# Section 4 and its appendix.
PAPER = {
    **DEFAULTS,
    "lr_decay": 0.998,
    "weight_decay": 1e-3,
    "batch_size": 50,
    "epochs": 5,
    "server.serve": "last",
}


class FedDynOptions(Options, frozen=True, kw_only=True):
    alpha: Annotated[
        float, Meta(gt=0, le=1000), flag("of the dynamic regulariser", "--dyn-alpha")
    ] = 0.01


class DynamicRegulariser:
    """The server's h, as a ServerRule. is_of_owners: N counts a tensor's owners, else all."""

    def __init__(self, config: RunConfig, alpha: float, *, is_of_owners: bool) -> None:
        self._kept = Kept(config)
        self._alpha = alpha
        self._is_of_owners = is_of_owners

    def begin(self, round: int) -> None:
        self._known = self._kept.known.copy()

    def add_(self, mean: Kernel, update: ClientUpdate, weight: float, sent: Tensors) -> None:
        mean.add_(update.tensors, weight)
        self._known.note(update, weight)

    def stepped(self, mean: Kernel, aggregate: Tensors, sent: Tensors) -> tuple[Tensors, Tensors]:
        stepped, kept = dict(aggregate), dict(self._kept.tensors)
        for name, h in self._kept.tensors.items():
            if owners := mean.weight(name):
                share = owners / self._known.total(name if self._is_of_owners else None)
                kept[name] = h - self._alpha * share * (aggregate[name] - sent[name])
                stepped[name] = aggregate[name] - (kept[name] / self._alpha).to(h.dtype)
        return stepped, state_of(kept, self._known)

    def state_dict(self) -> Tensors:
        return self._kept.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._kept.load_state_dict(state)


@register_method(
    "feddyn",
    defaults=DEFAULTS,
    paper=PAPER,
    options=FedDynOptions,
    on_device=OnDevice("depth", "M_e and 2 K_e", "K_e", "g_i, K_e"),
)
def feddyn(config: RunConfig, device: TorchDevice, options: FedDynOptions) -> Method:
    """The prefix to the device's exit, by a loss whose optima come to agree."""
    rule = DynamicRegulariser(config, options.alpha, is_of_owners=True)
    segments = rotation(config.rotation, config.seed)
    return DepthAveraging(config, segments, asks={"dyn_alpha": options.alpha}, server_rule=rule)
