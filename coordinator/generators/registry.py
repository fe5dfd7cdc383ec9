"""The generators by name: what the server puts where clients lack stages. A generator is a function
from the model's shapes to a Generator, in a file of its own:

    @register_generator("mine", defaults={"generator.generate": "all"}, options=MyOptions)
    def mine(shapes, names, settings, seed, device, options: MyOptions) -> Generator: ...

shapes: of every parameter, by name; names: of those that are to be generated, those of stage and
exit 1, which are sources only, included. Nothing here loads torch: the command line asks for names
before anything is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coordinator.config import GeneratorOptions
from coordinator.registry import PartRegistry
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensor_lists import is_frozen

if TYPE_CHECKING:
    import torch

    from coordinator.generators.base import Generator

GENERATORS: PartRegistry[Generator | None] = PartRegistry(
    "generator", "register_generator", "coordinator.generators", __file__
)
register_generator = GENERATORS.register


@register_generator("none")
def none(*_: object) -> None:
    """Each tensor is the mean over its owners."""


def make_generator(
    spec: ModelSpec,
    settings: GeneratorOptions,
    seed: int,
    device: str | torch.device = "cpu",
    frozen: Sequence[str] = (),
) -> Generator | None:
    """None where nothing is to be generated: no generator, gain 0, or a model of one exit. frozen:
    what no client trains and none generates, see is_frozen. Raises ConfigError listing the known
    ones."""
    from coordinator.generators.base import generated_names, parameter_shapes

    if settings.name == "none" or settings.gain == 0 or spec.exit == 1:
        return None
    names, shapes = generated_names(spec, settings.generate), parameter_shapes(spec)
    names = [name for name in names if not is_frozen(name, frozen)]
    return GENERATORS.make(settings.name, settings.own, shapes, names, settings, seed, device)
