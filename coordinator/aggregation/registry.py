"""The aggregation rules by name: how a round's updates become one model. A rule is a function from
the settings to a Kernel, made anew for each round, in a file of its own:

    @register_rule("mine", options=MyOptions)
    def mine(settings: AggregationOptions, options: MyOptions) -> Kernel: ...

Nothing here loads torch: the command line asks for names before anything is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.config import AggregationOptions
from coordinator.registry import PartRegistry

if TYPE_CHECKING:
    from coordinator.aggregation.mean import Kernel

RULES: PartRegistry[Kernel] = PartRegistry(
    "aggregation rule", "register_rule", "coordinator.aggregation", __file__
)
register_rule = RULES.register


def make_kernel(settings: AggregationOptions) -> Kernel:
    """A new one for each round. Raises ConfigError listing the known rules."""
    return RULES.make(settings.rule, settings.own, settings)
