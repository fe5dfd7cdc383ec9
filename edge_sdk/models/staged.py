"""A multi-exit network: stages in a chain, one exit (classifier head) after each.

Tensor names are those of the two module lists: `stages.0.*` and `exits.0.*` belong to stage and
exit 1. Exit e's subnetwork is stages 1..e with exits 1..e."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.protocol.messages import ModelSpec


class StagedModel(nn.Module):
    """stages[i] maps features to features; exits[i] maps stage i's features to (B, K) logits, or
    what else the task has (tasks/).

    main_weights: names of the weights that a coordinator may generate for stages that nobody
    trained; by default every parameter of the stages with at least 2 axes. Raises ConfigError for
    a name that is not one of those."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        exits: Sequence[nn.Module],
        *,
        main_weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleList(exits)
        matrices = [f"stages.{n}" for n, w in self.stages.named_parameters() if w.ndim >= 2]
        chosen = set(matrices if main_weights is None else main_weights)
        if unknown := sorted(chosen - set(matrices)):
            raise ConfigError(
                f"main weights {', '.join(unknown)} are no parameters of at least 2 axes in the "
                f"stages; those are {', '.join(matrices) or 'none'}"
            )
        self._main_weights = tuple(name for name in matrices if name in chosen)
        self.cuts: tuple[str, ...] = ()  # names in the module that it was made of, of every exit
        self.whole_bytes = 0  # of that module, which is in memory while it is cut
        self.doubt = ""  # about how it was cut, to be told before it is trained

    @property
    def main_weights(self) -> tuple[str, ...]:
        """Names of the convolutions, linear and recurrent matrices inside the stages, in
        registration order. BatchNorm, biases and exits are never among them."""
        return self._main_weights

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: (B, *input_shape). Returns the logits of every exit, shallow first, each (B, K)."""
        logits = []
        for stage, head in zip(self.stages, self.exits, strict=True):
            x = stage(x)
            logits.append(head(x))
        return logits

    def ready(self, device: str | torch.device) -> StagedModel:
        """Itself, on `device`, laid out for inputs from `moved`."""
        return self.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer once, by name, detached and contiguous."""
        held: dict[str, Tensor] = {}
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            held[name] = tensor.detach().contiguous()
        return held

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` into the model; names it lacks or has otherwise shaped raise ShapeError.

        What `tensors` lacks keeps its value: a job brings only what its segments need."""
        held = dict([*self.named_parameters(), *self.named_buffers()])
        for name, new in tensors.items():
            old = held.get(name)
            if old is None:
                raise ShapeError(f"tensor {name!r} does not belong to the model; rebuild its spec")
            if old.shape != new.shape or old.dtype != new.dtype:
                raise ShapeError(
                    f"tensor {name!r} is {tuple(new.shape)} {new.dtype}, expected "
                    f"{tuple(old.shape)} {old.dtype}; both sides must build the same ModelSpec"
                )
        with torch.no_grad():
            for name, new in tensors.items():
                held[name].copy_(new)


def drawn_inputs(spec: ModelSpec, count: int, seed: int = 0) -> Tensor:
    """What a model of the spec takes, (count, *input_shape): float32 from 0 to 1, as scaled pixels,
    or int64 token ids. A function of its arguments; laid out as in training."""
    draws, shape = torch.Generator().manual_seed(seed), (count, *spec.input_shape)
    if spec.vocabulary:
        return torch.randint(spec.vocabulary, shape, generator=draws)
    return moved(torch.rand(shape, generator=draws), "cpu")


def moved(x: Tensor, device: str | torch.device) -> Tensor:
    """x on `device`; images (B, C, H, W) with their channels last in memory, as `ready` has its
    weights: a training step of `cnn` on x86 then takes 0.65 of the time (torch 2.13)."""
    if x.ndim == 4:
        return x.to(device, memory_format=torch.channels_last)
    return x.to(device)
