"""A hypernetwork: it generates the whole model of every client as one vector of weights, and learns
from how far each client's training moved it. Of a client it knows the number of its weights.

A client of K weights has M = ceil(K / L) embedding vectors V (M, d); L is the chunk. A trunk F, a
multilayer perceptron that all clients share, makes features f = F(V) (M, h), and layer j of a head
makes chunk j of the weights: W_j f_j + b_j (L,). Clients of the same M share a head, with a
`tolerance` also those of similar M, each by its first M layers (MH-pFedHN, arXiv 2507.22330). With
chunk 0 a client has a single vector, and the only layer of its head makes all K weights; the heads
by tensor of pFedHN (Shamsian et al. 2021) are rows of that layer, begun alike.

With D = sent - trained, in chunks D_j, the gradient of 1/2 |theta - trained|^2 is
    dW_j = D_j f_j^T,   db_j = D_j,   df_j = W_j^T D_j
and goes on through the trunk to V. Only D is needed for it: the features are computed again, and no
graph outlives a call. What took no part in a step has no gradient, rather than one of zeros: its
moments would move it on.

Memory: each head that is used has K (h + 1) weights, whatever the number of its clients; each
client M d more; all of it three times with Adam's moments. While learning, gradients of one
client's head and trunk beside it, or of all heads where clients are summed into one step. The five
models of the paper (K from 240,000 to 571,000) make 255 M weights: 1.0 GB, 3.1 GB with moments.

Initial values are draws of (seed, name): who comes first changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from coordinator.cohorts.sampling import job_seed
from edge_sdk.errors import ShapeError
from edge_sdk.protocol.tensors import Tensors, check_shapes

MOST_NORM = 50.0  # of a step's gradient; both papers' code
TRUNK = "trunk/"
EMBEDDING = "embedding/"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """embedding: d; hidden: h; layers: of the trunk; chunk: L, 0: all weights of a client; spread:
    standard deviation of embeddings at the start; is_rectified: a ReLU after the trunk's last
    layer; tolerance: by what share a head's clients may differ in M."""

    embedding: int = 64
    hidden: int = 128
    layers: int = 3
    chunk: int = 3072
    spread: float = 0.002
    is_rectified: bool = True
    tolerance: float = 0.0


@dataclass(frozen=True)
class Layout:
    """Of a client's model. num_chunks: M; chunk: L; head: the name of the head that makes it."""

    num_chunks: int
    chunk: int
    head: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The server's optimizer, Adam or, with `momentum`, SGD; each of torch."""

    lr: float
    momentum: float | None = None
    weight_decay: float = 0.0

    def make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if self.momentum is None:
            return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        momentum, decay = self.momentum, self.weight_decay
        return torch.optim.SGD(parameters, lr=self.lr, momentum=momentum, weight_decay=decay)

    @property
    def moments(self) -> tuple[str, ...]:
        """What torch keeps of each parameter."""
        if self.momentum is None:
            return ("exp_avg", "exp_avg_sq", "step")
        return ("momentum_buffer",) if self.momentum else ()


class Hypernetwork:
    """See the module's docstring. Clients are told apart by name, which has no slash."""

    def __init__(
        self, architecture: Architecture, rule: Rule, seed: int, device: str | torch.device = "cpu"
    ) -> None:
        self.architecture = architecture
        self._rule = rule
        self._seed = seed
        self._device = device
        self._parameters: dict[str, nn.Parameter] = {}  # by name, as they are first used
        self._moments: dict[str, Tensors] = {}  # of those that have taken a step
        self._frozen: set[str] = set()

    def layout(self, num_weights: int) -> Layout:
        """With a tolerance, the head's name is the largest M that it serves: sizes 1, 2, ... each
        the tolerance larger than the last, so a client's head depends on no other client."""
        if not (chunk := self.architecture.chunk):
            return Layout(1, num_weights, str(num_weights))
        num_chunks = math.ceil(num_weights / chunk)
        most = num_chunks if not self.architecture.tolerance else 1
        while most < num_chunks:
            most = max(most + 1, int(most * (1 + self.architecture.tolerance)))
        return Layout(num_chunks, chunk, str(most))

    @torch.no_grad()
    def generate(self, client: str, num_weights: int) -> Tensor:
        """The weights of a client's model: (num_weights,) float32 on the CPU."""
        layout = self.layout(num_weights)
        features = self._features(self._embedding(client, layout))  # (M, h)
        head = self._head(layout)
        chunks = [
            torch.addmv(bias, weight, feature)  # (L,)
            for feature, (weight, bias) in zip(features, head, strict=True)
        ]
        return torch.cat(chunks)[:num_weights].cpu()

    def backward(self, client: str, delta: Tensor) -> None:
        """Add the gradient of what generated `delta`'s client. delta: (K,), sent minus trained."""
        layout = self.layout(len(delta))
        features = self._features(self._embedding(client, layout))  # (M, h)
        made = layout.num_chunks * layout.chunk
        padded = functional.pad(delta.to(self._device), (0, made - len(delta)))
        rows = padded.view(layout.num_chunks, layout.chunk)  # (M, L)
        back = torch.empty_like(features)
        with torch.no_grad():
            for place, (weight, bias) in enumerate(self._head(layout)):
                back[place] = rows[place] @ weight
                _add_gradient_(weight, torch.outer(rows[place], features[place]))
                _add_gradient_(bias, rows[place].clone())
        features.backward(back)

    def step(self) -> float:
        """One step of all that has a gradient, and forget the gradients. Returns their norm, which
        is clipped to MOST_NORM; where it is not finite no step is taken."""
        taking_part = {
            name: parameter
            for name, parameter in sorted(self._parameters.items())
            if parameter.grad is not None
        }
        parameters = list(taking_part.values())
        norm = float(nn.utils.clip_grad_norm_(parameters, MOST_NORM))
        if parameters and math.isfinite(norm):
            optimizer = self._rule.make(parameters)
            for name, parameter in taking_part.items():
                if name in self._moments:
                    optimizer.state[parameter] = self._moments[name]
            optimizer.step()
            self._moments |= {name: optimizer.state[p] for name, p in taking_part.items()}
        for parameter in parameters:
            parameter.grad = None
        return norm

    def freeze(self) -> None:
        """From now on the trunk, and layers of heads that have taken a step, stay as they are: who
        joins later learns an embedding, and only layers that nobody has trained."""
        learned = {name for name in self._moments if not name.startswith(EMBEDDING)}
        self._frozen = learned | set(self._trunk_names())
        for name in self._frozen & set(self._parameters):
            self._parameters[name].requires_grad_(False)

    @property
    def num_bytes(self) -> int:
        """Of parameters and moments."""
        held = [p.nbytes for p in self._parameters.values()]
        return sum(held) + sum(t.nbytes for m in self._moments.values() for t in m.values())

    @property
    def is_frozen(self) -> bool:
        return bool(self._frozen)

    def state_dict(self) -> Tensors:
        """What has taken a step; the rest is drawn again."""
        state: Tensors = {}
        for name, moments in self._moments.items():
            state[f"parameter/{name}"] = self._parameters[name].detach().cpu().clone()
            for key, moment in moments.items():
                state[f"moment/{key}/{name}"] = moment.cpu().clone()
        return state | {f"frozen/{name}": torch.tensor(True) for name in self._frozen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ShapeError for the state of another hypernetwork or optimizer."""
        names = [key.removeprefix("parameter/") for key in state if key.startswith("parameter/")]
        frozen = [key.removeprefix("frozen/") for key in state if key.startswith("frozen/")]
        shapes: dict[str, tuple[int, ...]] = {f"frozen/{name}": () for name in frozen}
        for name in names:
            shapes[f"parameter/{name}"] = self._shape(name)
            for key in self._rule.moments:
                shapes[f"moment/{key}/{name}"] = () if key == "step" else self._shape(name)
        check_shapes(state, shapes, "checkpoint, hypernetwork")
        self._parameters, self._moments, self._frozen = {}, {}, set(frozen)
        for name in names:
            # a step's number stays on the CPU, as torch keeps it
            moments = {key: state[f"moment/{key}/{name}"].clone() for key in self._rule.moments}
            self._moments[name] = {
                key: t if key == "step" else t.to(self._device) for key, t in moments.items()
            }
            self._hold(name, state[f"parameter/{name}"].clone())

    def _features(self, embedding: Tensor) -> Tensor:
        """(M, d) -> (M, h)."""
        x, last = embedding, self.architecture.layers - 1
        for number in range(last + 1):
            name = f"{TRUNK}{number}"
            x = functional.linear(x, self._get(f"{name}/weight"), self._get(f"{name}/bias"))
            if number < last or self.architecture.is_rectified:
                x = x.relu()
        return x

    def _embedding(self, client: str, layout: Layout) -> nn.Parameter:
        return self._get(f"{EMBEDDING}{layout.num_chunks}/{client}")

    def _head(self, layout: Layout) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Weight (L, h) and bias (L,) of the first M layers."""
        names = [f"head/{layout.head}/{number}" for number in range(layout.num_chunks)]
        return [(self._get(f"{name}/weight"), self._get(f"{name}/bias")) for name in names]

    def _trunk_names(self) -> list[str]:
        layers = range(self.architecture.layers)
        return [f"{TRUNK}{number}/{part}" for number in layers for part in ("weight", "bias")]

    def _get(self, name: str) -> nn.Parameter:
        if name not in self._parameters:
            shape = self._shape(name)
            rng = torch.Generator().manual_seed(job_seed(self._seed, 0, name))
            if name.startswith(EMBEDDING):
                drawn = self.architecture.spread * torch.randn(shape, generator=rng)
            else:  # as torch's linear layers begin
                is_first = name.startswith(f"{TRUNK}0/")
                inputs = self.architecture.embedding if is_first else self.architecture.hidden
                bound = 1 / math.sqrt(inputs)
                drawn = torch.empty(shape).uniform_(-bound, bound, generator=rng)
            self._hold(name, drawn)
        return self._parameters[name]

    def _hold(self, name: str, value: Tensor) -> None:
        is_learned = name not in self._frozen
        self._parameters[name] = nn.Parameter(value.to(self._device), requires_grad=is_learned)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of the parameter of this name. Raises ShapeError for a name that there is not."""
        sizes = self.architecture
        match name.split("/"):
            case ["trunk", _, "weight"] if name in self._trunk_names():
                is_first = name.startswith(f"{TRUNK}0/")
                return (sizes.hidden, sizes.embedding if is_first else sizes.hidden)
            case ["trunk", _, "bias"] if name in self._trunk_names():
                return (sizes.hidden,)
            case ["head", head, number, part] if head.isdecimal() and number.isdecimal():
                chunk = sizes.chunk or int(head)
                if part in ("weight", "bias"):
                    return (chunk, sizes.hidden) if part == "weight" else (chunk,)
            case ["embedding", num_chunks, _] if num_chunks.isdecimal():
                return (int(num_chunks), sizes.embedding)
        raise ShapeError(f"checkpoint: {name!r} is no parameter of this hypernetwork")


def _add_gradient_(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.requires_grad:
        held = parameter.grad
        parameter.grad = gradient if held is None else held.add_(gradient)
