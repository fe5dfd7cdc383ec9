"""What a device may say of the models that the run offers: more than that is no device's to say."""

from __future__ import annotations

from edge_sdk.models import build
from edge_sdk.models.flat import num_weights, parameter_shapes
from edge_sdk.protocol.messages import ModelSpec, Ready, Welcome

# A device's own model has at most so many times the weights of the largest offered: the server of
# such a method keeps 1.5 kB or more for each weight of every size of model that it has met.
OWN = 2


class Offered:
    """What a run's welcome offers, and what its devices have said of it."""

    def __init__(self, welcome: Welcome) -> None:
        self._deepest = welcome.model.exit
        self._variants = welcome.variants
        self._is_flat = welcome.plan.flat
        self._weights = tuple(map(weights_of, welcome.variants)) if self._is_flat else ()
        self._most = 0
        if self._is_flat:
            self._most = OWN * max(weights_of(welcome.model), *self._weights, 1)
        self._own: dict[str, int] = {}  # weights of the clients' own models

    def misfit(self, name: str, ready: Ready) -> str:
        """Why the client cannot say this of the run's models; "" if it can."""
        deepest = self._deepest
        if ready.exit > deepest or any(stage > deepest for stage in ready.stages):
            return f"the model has {deepest} exits"
        if ready.stage_s and len(ready.stage_s) != len(ready.stages):
            return f"{len(ready.stage_s)} stage_s for {len(ready.stages)} stages"
        if ready.variant > len(self._variants):
            return f"variant {ready.variant} of {len(self._variants)} that are offered"
        if not ready.exit:
            return f"variant {ready.variant} without an exit" if ready.variant else ""
        if ready.variant and ready.exit != (exit := self._variants[ready.variant - 1].exit):
            return f"exit {ready.exit} of variant {ready.variant}, which has exit {exit}"
        if self._variants and ready.stages:
            return "a variant is trained whole, and not its stages alone"
        if not self._is_flat:
            if self._variants and not ready.variant:
                return f"exit {ready.exit} without one of the {len(self._variants)} variants"
            return f"{ready.num_weights} weights, none are asked for" if ready.num_weights else ""
        return self._weights_misfit(name, ready)

    def _weights_misfit(self, name: str, ready: Ready) -> str:
        """Of a plan of flat weights. A client's own model stays the same while this coordinator
        runs: what the run has learned of one says nothing of another."""
        told = ready.num_weights
        if ready.variant:
            wanted = self._weights[ready.variant - 1]
            same = told == wanted
            return "" if same else f"{told} weights, variant {ready.variant} has {wanted}"
        if not 0 < told <= self._most:
            return f"a model of its own of {told} weights, expected 1 to {self._most}"
        if told != (before := self._own.setdefault(name, told)):
            return (
                f"a model of its own of {told} weights, it had one of {before}; start the device "
                "with that one, or under another name"
            )
        return ""


def weights_of(spec: ModelSpec) -> int:
    """Parameters of the model, one by one."""
    return num_weights(parameter_shapes(build(spec)))
