"""From aggregate to new global model, and from globals to what is served; for every method."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from coordinator.config import ServerOptions
from edge_sdk.tensors import Tensors, check_specs, specs_of


class Server:
    """Holds the global model w, momentum v and the served average. See ServerOptions."""

    def __init__(self, initial: Tensors, parameters: set[str], options: ServerOptions) -> None:
        self.options = options
        self.globals = initial
        self._parameters = parameters
        self._velocity: Tensors = {}
        self._average: Tensors = {}
        self._average_weight = 0.0

    def step(self, aggregate: Mapping[str, Tensor]) -> None:
        """Take one round's aggregate; tensors are new objects, the old ones stay as they were."""
        new = dict(aggregate)
        if self.options.momentum or self.options.lr != 1:
            for name in self._parameters & set(new):
                if new[name] is self.globals[name]:
                    continue  # nobody owned it this round: neither it nor its momentum moves
                moved = new[name] - self.globals[name]
                if name in self._velocity:
                    moved = moved + self.options.momentum * self._velocity[name]
                self._velocity[name] = moved
                new[name] = self.globals[name] + self.options.lr * moved
        self.globals = new
        # normalised geometric average: sum d^i w / sum d^i, newest first
        self._average_weight = self.options.ema * self._average_weight + 1
        for name, tensor in new.items():
            old = self._average.get(name)
            if old is None or not tensor.is_floating_point():
                self._average[name] = tensor.clone()
            else:
                self._average[name] = torch.lerp(old, tensor, 1 / self._average_weight)

    def served(self) -> Tensors:
        """The model to deploy: the average of the globals, or the last one."""
        return self._average if self.options.serve == "ema" and self._average else self.globals

    def state_dict(self) -> Tensors:
        state = {f"globals/{name}": tensor for name, tensor in self.globals.items()}
        state |= {f"velocity/{name}": tensor for name, tensor in self._velocity.items()}
        state |= {f"average/{name}": tensor for name, tensor in self._average.items()}
        state["average_weight"] = torch.tensor(self._average_weight, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ShapeError if the state is another model's. Tensors keep the model's order: a
        checkpoint file has its own, and the wire's tensor lists follow the model's."""
        loaded = under(state, "globals/")
        check_specs(specs_of(loaded), specs_of(self.globals), "checkpoint", is_ordered=False)
        order = list(self.globals)
        self.globals = {name: loaded[name] for name in order}
        self._velocity = under(state, "velocity/")
        average = under(state, "average/")
        self._average = {name: average[name] for name in order if name in average}
        self._average_weight = float(state["average_weight"])


def under(state: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The entries whose name begins with `prefix`, without it."""
    return {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
