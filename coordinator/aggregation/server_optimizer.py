"""From aggregate to new global model, and from globals to what is served; for every method."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from coordinator.config import ServerOptions
from edge_sdk.protocol.tensor_lists import check_specs
from edge_sdk.protocol.tensors import Tensors, check_finite, check_shapes, specs_of, with_prefix


class Server:
    """Holds the global model w, its moments and the served average: up to four models, whatever the
    number of clients, and during a step the new w and moments beside them. See ServerOptions."""

    def __init__(self, initial: Tensors, parameters: set[str], options: ServerOptions) -> None:
        self.options = options
        self.globals = initial
        self._parameters = parameters
        self._first: Tensors = {}  # momentum, or the first moment
        self._second: Tensors = {}
        self._average: Tensors = {}
        self._average_weight = 0.0

    def step(
        self, aggregate: Mapping[str, Tensor], owned: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take one round's aggregate; tensors are new objects, the old ones stay as they were.
        owned: where only some elements of a tensor had an owner, which ones (bool, of its shape or
        one that is broadcast to it): the others keep their value and their moments. Raises
        ShapeError, and then changes nothing, if the new state would not be finite."""
        options = self.options
        new, first, second = dict(aggregate), dict(self._first), dict(self._second)
        is_plain = options.optimizer == "fedavgm" and not options.momentum and options.lr == 1
        for name in self._parameters & set(new) if not is_plain else ():
            if new[name] is self.globals[name]:
                continue  # nobody owned it this round: neither it nor its momentum moves
            moved = new[name] - self.globals[name]
            direction = self._direction(name, moved, first, second)
            new[name] = self.globals[name] + options.lr * direction
            if owned is None or bool(owned[name].all()):
                continue
            kept = ((new, self.globals), (first, self._first), (second, self._second))
            for held, before in kept:
                if name in before:
                    held[name] = torch.where(owned[name], held[name], before[name])
        # normalised geometric average: sum d^i w / sum d^i, newest first
        weight, average = options.ema * self._average_weight + 1, dict(self._average)
        for name, tensor in new.items() if options.serve == "ema" else ():
            old = average.get(name)
            if old is None or not tensor.is_floating_point():
                average[name] = tensor.clone()
            elif tensor is self.globals[name] and torch.equal(old, tensor):
                continue  # what never moves stays as it is, its zeros' signs too
            else:
                average[name] = torch.lerp(old, tensor, 1 / weight)
        for held in (new, first, second, average):
            check_finite(held, "the server's step")
        self.globals, self._first, self._second = new, first, second
        self._average, self._average_weight = average, weight

    def _direction(self, name: str, moved: Tensor, first: Tensors, second: Tensors) -> Tensor:
        """The step of one parameter for the aggregate's difference; replaces its moments in `first`
        and `second`."""
        options, old = self.options, first.get(name)
        if options.optimizer == "fedavgm":
            first[name] = moved if old is None else moved + options.momentum * old
            return first[name]
        old = torch.zeros_like(moved) if old is None else old
        first[name] = options.momentum * old + (1 - options.momentum) * moved
        square, spread = moved.square(), second.get(name)
        if spread is None:
            spread = torch.full_like(moved, options.tau**2)
        if options.optimizer == "fedadam":
            spread = options.beta2 * spread + (1 - options.beta2) * square
        else:
            spread = spread - (1 - options.beta2) * square * torch.sign(spread - square)
        second[name] = spread
        return first[name] / (spread.sqrt() + options.tau)

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
        shapes = {name: tuple(tensor.shape) for name, tensor in self.globals.items()}
        for part in ("first/", "second/", "average/"):
            held = with_prefix(state, part)
            check_shapes(
                held, {n: s for n, s in shapes.items() if n in held}, f"checkpoint, {part}"
            )
        rest = {name: tensor for name, tensor in state.items() if "/" not in name}
        check_shapes(rest, {"average_weight": ()}, "checkpoint, server")
        loaded = with_prefix(state, "globals/")
        check_specs(specs_of(loaded), specs_of(self.globals), "checkpoint", is_ordered=False)
        order = list(self.globals)
        self.globals = {name: loaded[name] for name in order}
        self._first, self._second = with_prefix(state, "first/"), with_prefix(state, "second/")
        average = with_prefix(state, "average/")
        self._average = {name: average[name] for name in order if name in average}
        self._average_weight = float(state["average_weight"])
