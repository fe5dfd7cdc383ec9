"""A generator of your own: who lacks a stage counts with a part of what its owners moved.

PYTHONPATH=examples edge-coordinator emulate --import own_generator --generator half-way
"""

from collections import Counter
from typing import Annotated

from coordinator.config import Options, Share, flag
from coordinator.generators.registry import register_generator


class HalfWay(Options, frozen=True, kw_only=True):
    part: Annotated[Share, flag("of the owners' movement")] = 0.5


@register_generator("half-way", options=HalfWay, defaults={"generator.generate": "all"})
class HalfWayGenerator:
    def __init__(self, shapes, names, settings, seed, device, options):
        self._names, self._part, self._owned, self._total = names, options.part, Counter(), 0.0

    def observe(self, update, current, weight):
        self._total += weight
        self._owned.update({name: weight for name in self._names if name in update.tensors})

    def fit(self, current, round):
        return {"generator_bytes": 8.0 * len(self._owned)}

    def generate(self, current, mean):
        for name, owned in self._owned.items():
            if owned < self._total:
                step = self._part * (mean[name] - current[name])
                yield self._total - owned, {name: current[name] + step}
        self._owned, self._total = Counter(), 0.0

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """Nothing is kept from round to round."""
