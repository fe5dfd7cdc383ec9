"""Whether a model that was begun from frozen weights is any better than those, by the hold-outs of
clients: each tells the loss of the model that it received. What is compared is each client's loss
now with its own at the start, so who takes part in a round changes nothing.

The loss of a model is known only when it was sent, a round after it was made. So what is served is
the newest model that was found to be no worse than the start: a round older than the last one."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import torch
from torch import Tensor

from coordinator.cohorts.base import ClientUpdate
from edge_sdk.errors import ShapeError
from edge_sdk.protocol.tensors import Tensors, check_shapes, with_prefix


class Verdict(Enum):
    BETTER = "better"  # or as good
    WORSE = "worse"
    OPEN = "open"  # nobody who told a loss had told that of the start


class FrozenStart:
    """Of one family. served: those of its tensors that are trained, as of the model to serve."""

    def __init__(self, trained: Mapping[str, Tensor]) -> None:
        self.served: Tensors = dict(trained)
        self._start: dict[str, float] = {}  # loss by client
        self._has_moved = False
        self._now: dict[str, tuple[float, int]] = {}  # of this round: loss, examples

    def hear_(self, update: ClientUpdate) -> None:
        """What an update of this round says of the model that its client received."""
        held = update.message.holdout
        if held and not update.staleness:
            self._now[update.client.id] = held.loss, held.num_examples

    def judge_(self, sent: Mapping[str, Tensor]) -> tuple[Verdict, float]:
        """Of the model that was sent in this round, and the loss that it saves against the start, a
        mean over examples (0 where open). Serve it from now on if it is none the worse."""
        now, self._now = self._now, {}
        if not self._has_moved:
            self._start |= {name: loss for name, (loss, _) in now.items()}
            return Verdict.OPEN, 0.0
        known = sorted(now.keys() & self._start.keys())
        total = sum(now[name][1] for name in known)
        if not total:
            return Verdict.OPEN, 0.0
        saved = sum(now[name][1] * (self._start[name] - now[name][0]) for name in known) / total
        if saved < 0:
            return Verdict.WORSE, saved
        self.served = {name: sent[name] for name in self.served}
        return Verdict.BETTER, saved

    def note_step_(self) -> None:
        """The model is not that of the start any more."""
        self._has_moved = True

    def state_dict(self) -> Tensors:
        # copies: a file holds no tensor twice, and the model's own are those where it never moved
        state = {f"served/{name}": tensor.clone() for name, tensor in self.served.items()}
        for name, loss in self._start.items():
            state[f"start/{name}"] = torch.tensor(loss, dtype=torch.float64)
        return state | {"has_moved": torch.tensor(self._has_moved)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ShapeError."""
        served, start = with_prefix(state, "served/"), with_prefix(state, "start/")
        shapes = {name: tuple(tensor.shape) for name, tensor in self.served.items()}
        check_shapes(served, shapes, "checkpoint, served")
        check_shapes(start, dict.fromkeys(start, ()), "checkpoint, start")
        if "has_moved" not in state:
            raise ShapeError("checkpoint lacks has_moved")
        self.served = {name: served[name] for name in self.served}
        self._start = {name: float(loss) for name, loss in sorted(start.items())}
        self._has_moved = bool(state["has_moved"])
