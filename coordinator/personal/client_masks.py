"""A mask of the global model for each client (edge_sdk/models/masks.py), which only loses entries,
and the values that pruned weights begin again from. Of K weights K / 8 bytes a client."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from edge_sdk.errors import ShapeError
from edge_sdk.models.masks import mask_bits, mask_of, packed
from edge_sdk.protocol.tensors import Tensors, check_shapes, with_prefix

PARTS = INITIAL, CLIENTS = "initial/", "clients/"  # of the state


class ClientMasks:
    """initial: the parameters that a run begins from; names: of those that have a mask.

    held: of each client that has returned an update, the bits of its masks, one weight after the
    other, and a last byte: 1 while its device has the initial values."""

    def __init__(self, initial: Mapping[str, Tensor], names: Collection[str]) -> None:
        self.initial = {name: tensor.clone() for name, tensor in initial.items()}
        self._shapes = {name: initial[name].shape for name in names}
        self._sizes = [-(-shape.numel() // 8) for shape in self._shapes.values()]
        self.held: dict[str, Tensor] = {}

    def of(self, client_id: str) -> Tensors:
        """Its masks by the names of the weights; all ones where it has returned nothing yet."""
        if client_id in self.held:
            return self._masks(self.held[client_id])
        return {name: torch.ones(shape, dtype=torch.bool) for name, shape in self._shapes.items()}

    def sent_to(self, client_id: str, model: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
        """What its next job brings of `model`, and beside it the initial values, unless its device
        has them."""
        beside = {f"{INITIAL}{name}": tensor for name, tensor in self.initial.items()}
        return packed(model, self.of(client_id)), {} if self._has_initial(client_id) else beside

    def after(self, client_id: str, masks: Mapping[str, Tensor], state_round: int) -> Tensor:
        """What is held of a client once its update counts. masks: that came with it, of which what
        the client had not is left out. state_round: of what its device had kept; 0: nothing, so
        that the initial values, unless they came with this job, are lost there."""
        has_initial = not self._has_initial(client_id) or state_round > 0
        before = self.of(client_id)
        bits = [mask_bits(masks[name] & before[name]) for name in self._shapes]
        return torch.cat([*bits, torch.tensor([has_initial], dtype=torch.uint8)])

    def _has_initial(self, client_id: str) -> bool:
        return client_id in self.held and bool(self.held[client_id][-1])

    def _masks(self, held: Tensor) -> Tensors:
        parts = held.split([*self._sizes, 1])
        named = zip(self._shapes.items(), parts, strict=False)
        return {name: mask_of(bits, shape, name) for (name, shape), bits in named}

    def state_dict(self) -> Tensors:
        state = {f"{INITIAL}{name}": tensor for name, tensor in self.initial.items()}
        return state | {f"{CLIENTS}{client_id}": held for client_id, held in self.held.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ShapeError for the state of another model."""
        check_shapes({n: t for n, t in state.items() if not n.startswith(PARTS)}, {}, "checkpoint")
        initial, clients = with_prefix(state, INITIAL), with_prefix(state, CLIENTS)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.initial.items()}
        check_shapes(initial, shapes, "checkpoint, initial values")
        check_shapes(clients, dict.fromkeys(clients, (sum(self._sizes) + 1,)), "checkpoint, masks")
        for client_id, held in clients.items():
            if held.dtype != torch.uint8:
                raise ShapeError(f"checkpoint, masks of {client_id}: {held.dtype}, expected uint8")
            self._masks(held)
        self.initial = {name: initial[name] for name in self.initial}
        self.held = clients
