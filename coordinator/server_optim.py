"""From aggregate to new global model, and from globals to what is served; for every method."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from coordinator.config import ServerOptions
from edge_sdk.tensors import Tensors, check_specs, specs_of, under


class Server:
    """Holds the global model w, its moments and the served average: up to four models, whatever the
    number of clients. See ServerOptions."""

    def __init__(self, initial: Tensors, parameters: set[str], options: ServerOptions) -> None:
        self.options = options
        self.globals = initial
        self._parameters = parameters
        self._first: Tensors = {}  # momentum, or the first moment
        self._second: Tensors = {}
        self._average: Tensors = {}
        self._average_weight = 0.0

    def step(self, aggregate: Mapping[str, Tensor]) -> None:
        """Take one round's aggregate; tensors are new objects, the old ones stay as they were."""
        options = self.options
        new = dict(aggregate)
        is_plain = options.optimizer == "fedavgm" and not options.momentum and options.lr == 1
        for name in self._parameters & set(new) if not is_plain else ():
            if new[name] is self.globals[name]:
                continue  # nobody owned it this round: neither it nor its momentum moves
            moved = new[name] - self.globals[name]
            new[name] = self.globals[name] + options.lr * self._direction(name, moved)
        self.globals = new
        # normalised geometric average: sum d^i w / sum d^i, newest first
        self._average_weight = options.ema * self._average_weight + 1
        for name, tensor in new.items():
            old = self._average.get(name)
            if old is None or not tensor.is_floating_point():
                self._average[name] = tensor.clone()
            else:
                self._average[name] = torch.lerp(old, tensor, 1 / self._average_weight)

    def _direction(self, name: str, moved: Tensor) -> Tensor:
        """The step of one parameter for the aggregate's difference; updates its moments."""
        options, old = self.options, self._first.get(name)
        if options.optimizer == "fedavgm":
            self._first[name] = moved if old is None else moved + options.momentum * old
            return self._first[name]
        old = torch.zeros_like(moved) if old is None else old
        first = options.momentum * old + (1 - options.momentum) * moved
        square = moved.square()
        second = self._second.get(name)
        if second is None:
            second = torch.full_like(moved, options.tau**2)
        if options.optimizer == "fedadam":
            second = options.beta2 * second + (1 - options.beta2) * square
        else:
            second = second - (1 - options.beta2) * square * torch.sign(second - square)
        self._first[name], self._second[name] = first, second
        return first / (second.sqrt() + options.tau)

    def served(self) -> Tensors:
        """The model to deploy: the average of the globals, or the last one."""
        return self._average if self.options.serve == "ema" and self._average else self.globals

    def state_dict(self) -> Tensors:
        state = {f"globals/{name}": tensor for name, tensor in self.globals.items()}
        state |= {f"first/{name}": tensor for name, tensor in self._first.items()}
        state |= {f"second/{name}": tensor for name, tensor in self._second.items()}
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
        self._first, self._second = under(state, "first/"), under(state, "second/")
        average = under(state, "average/")
        self._average = {name: average[name] for name in order if name in average}
        self._average_weight = float(state["average_weight"])
