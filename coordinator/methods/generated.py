"""Methods that generate a whole model for each client: a job brings one vector of weights, trained
it comes back, and the hypernetwork (personal/) steps by how far it moved. What differs between the
methods is data: the hypernetwork's shape, and whether a light global model teaches.

Memory: the hypernetwork, a round's updates, and one more vector for each. Steps wait for the last
update of the round: their order is drawn from (seed, round, client), so that of arrival changes
nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace
from torch import Tensor

from coordinator.aggregation.registry import make_kernel
from coordinator.cohorts.base import Assignment, Client, ClientUpdate, Offer
from coordinator.cohorts.sampling import job_seed
from coordinator.config import RunConfig
from coordinator.methods.base import Metrics
from coordinator.personal.hypernetwork import Hypernetwork
from coordinator.personal.variants import Variant, make_variant, variant_of
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment, Teacher
from edge_sdk.protocol.plan_tensors import FLAT
from edge_sdk.protocol.tensors import Tensors, check_shapes, specs_of, with_prefix
from edge_sdk.protocol.timing import Stopwatch

LIGHT = "(light)"  # among the hypernetwork's clients, none of whom may have such a name
LIGHT_ROLE = "teacher/"
CLIP_NORM = 50.0  # of a local step; published code of all three methods


@dataclass(frozen=True, kw_only=True)
class Generating:
    """apply: "successive", a step for each client of the round, its gradient taken at the
    parameters that the steps before left; "summed", one step of the gradients' sum. is_fresh:
    weights of the variants begin as a fresh model's. novel_after: the round after which the trunk
    and the trained heads stay as they are; 0: none. teaching: weight and temperature of a light
    model, the first variant, in the clients' loss; None: there is none."""

    apply: Literal["successive", "summed"] = "successive"
    is_fresh: bool = False
    novel_after: int = 0
    teaching: tuple[float, float] | None = None


class GeneratedModels:
    """`current` and `served` are the light model, {} without one."""

    is_personal = True

    def __init__(self, config: RunConfig, network: Hypernetwork, generating: Generating) -> None:
        self._config, self._network, self._generating = config, network, generating
        self._variants = [
            make_variant(
                replace(config.model, exit=exit),
                config.seed,
                network.architecture.hidden,
                is_fresh=generating.is_fresh,
            )
            for exit in range(1, config.model.exit + 1)
        ]
        self._light = self._variants[0] if generating.teaching else None
        self.spec = self._light.spec if self._light else config.model
        self._buffers: Tensors = dict(self._light.buffers) if self._light else {}
        self._current: Tensors | None = None  # made when it is asked for

    def offer(self) -> Offer:
        config = self._config
        specs = tuple(variant.spec for variant in self._variants)
        return Offer(config.model, self._plan(config.rounds, config.model), specs)

    def assign(self, client: Client, round: int) -> Assignment:
        variant = variant_of(client, self._variants)
        own = replace(
            self._config.model, exit=client.exit
        )  # of a model of its own only that counts
        model = variant.spec if variant else own
        tensors = {FLAT: self._weights(client.id, variant, client.num_weights)}
        tensors |= {LIGHT_ROLE + name: tensor for name, tensor in self.current().items()}
        seed = job_seed(self._config.seed, round, client.id)
        plan = replace(self._plan(round, model), seed=seed)
        return Assignment(model, plan, tensors, specs_of(tensors))

    def _plan(self, round: int, model: ModelSpec) -> Plan:
        config, last = self._config, model.exit
        alone = (0.0,) * (last - 1) + (1.0,)
        plan = replace(
            config.plan(round),
            segments=(Segment(first=1, last=last),),
            exit_weights=config.exit_weights[:last] or alone,
            clip_norm=CLIP_NORM,
            flat=True,
        )
        if not (self._light and self._generating.teaching):
            return plan
        weight, temperature = self._generating.teaching
        light = Teacher(
            model=self._light.spec, weight=weight, temperature=temperature, is_trained=True
        )
        return replace(plan, teacher=light)

    def _weights(self, name: str, variant: Variant | None, num_weights: int) -> Tensor:
        """(K,) as they are sent. num_weights: of a client with a model of its own."""
        made = self._network.generate(name, variant.num_weights if variant else num_weights)
        return variant.weights(made) if variant else made

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> Metrics:
        metrics, watch = Metrics(), Stopwatch()
        generating, network = self._generating, self._network
        held = sorted(updates, key=self._turn(round))
        if not held:
            return metrics
        mean, light = make_kernel(self._config.aggregation), self.current()
        moved: list[tuple[str, Tensor]] = []
        for update in held:
            client, trained = update.client, update.tensors[FLAT]
            variant = variant_of(client, self._variants)
            with watch("generate"):  # what was sent, to the bit
                sent = update.sent.get(FLAT)
                if sent is None:
                    sent = self._weights(client.id, variant, len(trained))
            delta = sent - trained
            moved.append((client.id, variant.delta(delta) if variant else delta))
            if light:
                weight = update.weight(self._config.weighting)
                mean.add_(_brought_forward(update, light), weight)
        metrics.num_updates = len(held)
        if generating.novel_after and round > generating.novel_after and not network.is_frozen:
            network.freeze()
        norms = []
        with watch("fit"):
            if self._light:
                norms += self._step_light(self._light, mean.result(light), light)
            for name, delta in moved:
                network.backward(name, delta)
                if generating.apply == "successive":
                    norms.append(network.step())
            if generating.apply == "summed":
                norms.append(network.step())
        self._current = None
        taken = [norm for norm in norms if norm < float("inf")]
        metrics.values[f"steps_{generating.apply}"] = float(len(taken))
        if taken:
            metrics.values["hypernetwork_gradient"] = sum(taken) / len(taken)
        if len(taken) < len(norms):
            metrics.values["aggregate_refused"] = 1.0
        metrics.values["hypernetwork_bytes"] = float(network.num_bytes)
        metrics.phases |= watch.phases
        return metrics

    def _turn(self, round: int) -> Callable[[ClientUpdate], tuple[int, int]]:
        """By what a round's updates are sorted."""
        seed = self._config.seed
        return lambda update: (job_seed(seed, round, f"step/{update.client.id}"), update.staleness)

    def _step_light(self, light: Variant, mean: Tensors, sent: Tensors) -> list[float]:
        """The light model's step: the mean of its movements is the movement to the mean. It comes
        before the clients' own, whose features it changes."""
        self._network.backward(LIGHT, light.delta(light.flat(sent) - light.flat(mean)))
        self._buffers = {name: mean[name] for name in self._buffers}
        return [self._network.step()]

    def current(self) -> Tensors:
        if self._current is None:
            light = self._light
            made = light and light.tensors(self._weights(LIGHT, light, 0), self._buffers)
            self._current = made or {}
        return self._current

    def begin_from(self, tensors: Tensors) -> None:
        """Nothing: all weights are generated, and these methods refuse --init."""

    def served(self) -> Tensors:
        return self.current()

    def deployed(self, client: Client) -> tuple[ModelSpec, Tensors]:
        """The client's own model. Its statistics of BatchNorm are with the client: here they are a
        fresh model's. Raises ConfigError where the client alone knows the model's architecture."""
        variant = variant_of(client, self._variants)
        if variant is None:
            raise ConfigError(
                f"client {client.id!r} has a model of its own kind, of which only its number of "
                "weights is known here; export it on that device, by edge-sdk export"
            )
        return variant.spec, variant.tensors(self._weights(client.id, variant, 0))

    def state_dict(self) -> Tensors:
        state = {f"light/{name}": tensor for name, tensor in self._buffers.items()}
        return state | self._network.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        buffers = with_prefix(state, "light/")
        shapes = {name: tuple(tensor.shape) for name, tensor in self._buffers.items()}
        check_shapes(buffers, shapes, "checkpoint, light model")
        rest = {name: tensor for name, tensor in state.items() if not name.startswith("light/")}
        self._network.load_state_dict(rest)
        self._buffers = {name: buffers[name].clone() for name in self._buffers}
        self._current = None


def _brought_forward(update: ClientUpdate, light: Tensors) -> Tensors:
    """An update's light model; of a late one the movement, from the present model on."""
    brought = with_prefix(update.tensors, LIGHT_ROLE)
    if not update.staleness:
        return brought
    began = with_prefix(update.sent, LIGHT_ROLE)
    return {
        name: light[name] + (tensor - began[name])
        if name in began and tensor.is_floating_point()
        else tensor
        for name, tensor in brought.items()
    }
