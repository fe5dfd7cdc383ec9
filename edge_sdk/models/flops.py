"""Operations of a training step, counted in the forward pass: 2 per multiply-add.

The products of convolutions, linear and recurrent layers and of attention count, and nothing else:
that is all but a few percent. torch's own FlopCounterMode counts the same (test_counting.py), but
attention on a CPU, and imports torch._dynamo for it: 75 MB and 2 s."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, is_grad_enabled
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm"}
SUMMED_PRODUCTS = {"addmm": 1, "baddbmm": 1}  # where the factors begin
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
ATTENTION = {"scaled_dot_product_attention"}


class FlopCounter(TorchFunctionMode):
    """A context; `total`: the operations of the forward passes inside and of their backward passes,
    which are counted with them, once for each factor with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in CONVOLUTIONS:
            self._count(made.numel() * args[1][0].numel(), args[0], args[1])
        elif name in PRODUCTS:
            self._count(made.numel() * args[0].shape[-1], args[0], args[1])
        elif first := SUMMED_PRODUCTS.get(name):
            self._count(made.numel() * args[first].shape[-1], args[first], args[first + 1])
        elif name in RECURRENT:
            self._count_recurrent(args)
        elif name in ATTENTION:
            self._count_attention(args[0].numel() * args[1].shape[-2], *args[:3])
        elif name == "multi_head_attention_forward":  # of nn.MultiheadAttention, one function
            weight = args[5] if args[5] is not None else kwargs["q_proj_weight"]
            self._count_attention_layer(made[0], args[:3], weight, args[11])
        return made

    def _count(self, multiply_adds: int, *factors: Tensor) -> None:
        """Count a product. The gradient of each of its factors is another product as large."""
        with_gradient = sum(f.requires_grad for f in factors) if is_grad_enabled() else 0
        self.total += 2 * multiply_adds * (1 + with_gradient)

    def _count_recurrent(self, args: tuple[Any, ...]) -> None:
        """Count a recurrent layer. args: x (..., inputs), the steps of all examples; weights, two
        matrices or more for each layer and direction. Of the first layer's the first takes the
        input; all others take what they made themselves, which has a gradient."""
        lists = (given for given in args if isinstance(given, list | tuple) and len(given) > 1)
        matrices = next([w for w in given if w.ndim == 2] for given in lists if given[0].ndim == 2)
        steps = math.prod(args[0].shape[:-1])
        for number, weight in enumerate(matrices):
            self._count(steps * weight.numel(), weight if number else args[0], weight)

    def _count_attention(self, multiply_adds: int, *given: Tensor) -> None:
        """Count scores and their sums of values, as many each, of query, key and value; backward
        the scores once more, as they are not kept, and two gradients of each product."""
        has_gradient = is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        self.total += 2 * multiply_adds * (7 if has_gradient else 2)

    def _count_attention_layer(
        self, made: Tensor, given: tuple[Tensor, ...], first: Tensor, last: Tensor
    ) -> None:
        """Count attention with the products before and behind it, by the weights first and last.
        given: query (T, B, E), key and value (S, B, E)."""
        query, key, _ = given
        for each in given:
            self._count(each.numel() * query.shape[-1], each, first)
        self._count_attention(query.numel() * key.shape[0], query, first)
        self._count(query.numel() * query.shape[-1], made, last)
