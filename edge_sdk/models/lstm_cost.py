"""An nn.LSTM on the meta device as its fused kernel would do it, for costs.py.

torch computes an LSTM on the meta device step by step. That saves 0.43 of what the real CPU kernel
(oneDNN) saves for its backward pass, and costs.py then took 17 s for three layers of 51 steps. The
stand-in here does the same arithmetic in a few products and saves one buffer of the kernel's size.
The size is an upper bound fitted to oneDNN 3.12 (the same from SSE 4.1 to AVX-512): 1.05 to 1.35
times the real one from 9 to 300 features and 51 to 151 steps. Not every page of it is touched: the
predicted peak of a trainer was 1.02 to 1.51 times the measured one. Other kernels are unmeasured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def count_as_fused(model: nn.Module) -> None:
    """Replace the forward of every plain LSTM layer in `model` (one layer, one direction, no
    projection); others stay as torch has them. The model is good for counting only, afterwards."""
    for lstm in model.modules():
        if isinstance(lstm, nn.LSTM) and _is_plain(lstm):
            setattr(lstm, "forward", _stand_in(lstm))  # noqa: B010 - mypy: a method


def workspace_bytes(batch: int, window: int, inputs: int, hidden: int) -> int:
    """Upper bound of what the kernel keeps for one layer's backward pass, beside input and output.

    Per example and step, and one step more: the layer's state twice and its gradients, as wide as
    the wider of input and hidden (7), gates, their gradients and cell state (9), in float32."""
    wide, narrow = _padded(max(inputs, hidden)), _padded(hidden)
    return 4 * batch * (window + 1) * (7 * wide + 9 * narrow)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_ih: Tensor, weight_hh: Tensor) -> Tensor:
        """x: (B, window, inputs). Returns (B, window, hidden)."""
        batch, window, inputs = x.shape
        hidden = weight_hh.shape[1]
        steps = x.reshape(-1, inputs)  # (B window, inputs)
        states = x.new_empty(len(steps), hidden)
        torch.mm(steps, weight_ih.T)
        torch.mm(states, weight_hh.T)
        out = x.new_empty(batch, window, hidden)
        size = workspace_bytes(batch, window, inputs, hidden)
        workspace = x.new_empty(size, dtype=torch.uint8)
        ctx.save_for_backward(x, out, workspace, weight_ih, weight_hh)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, out, _, weight_ih, weight_hh = ctx.saved_tensors
        steps, states = x.reshape(-1, x.shape[2]), out.reshape(-1, out.shape[2])
        gates = x.new_empty(len(steps), len(weight_ih))  # (B window, 4 hidden)
        torch.mm(gates, weight_hh)
        for_x = torch.mm(gates, weight_ih).reshape(x.shape) if ctx.needs_input_grad[0] else None
        return for_x, torch.mm(gates.T, steps), torch.mm(gates.T, states)


def _stand_in(lstm: nn.LSTM) -> Any:
    kept = lstm.forward

    def forward(x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        if not isinstance(x, Tensor) or x.ndim != 3:  # a packed sequence, one example
            return kept(x, hx)
        along = x if lstm.batch_first else x.transpose(0, 1)
        out = _Fused.apply(along, lstm.weight_ih_l0, lstm.weight_hh_l0)  # type: ignore[no-untyped-call]
        last = out[:, -1].unsqueeze(0)  # (1, B, hidden)
        return out if lstm.batch_first else out.transpose(0, 1), (last, last.clone())

    return forward


def _is_plain(lstm: nn.LSTM) -> bool:
    return lstm.num_layers == 1 and not lstm.bidirectional and lstm.proj_size == 0


def _padded(features: int) -> int:
    return -(-features // 16) * 16
