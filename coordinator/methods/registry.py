"""The federated methods by name. A method is a function from a run's settings to a Method, in a
file of its own, which also says what the method has of its own:

    @register_method("mine", defaults={"server.momentum": 0.9}, options=MyOptions)
    def mine(config: RunConfig, device: Device, options: MyOptions) -> Method: ...

Nothing here loads torch: the command line asks for names before anything is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from coordinator.aggregation.registry import RULES
from coordinator.config import ADAPTIVE, LOCAL, RunConfig
from coordinator.generators.registry import GENERATORS
from coordinator.registry import OnDevice as OnDevice
from coordinator.registry import PartRegistry
from coordinator.settings import changed, shared_flags, value_at
from edge_sdk.errors import ConfigError
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.metrics import ONLY_CLASSES

if TYPE_CHECKING:
    import torch

    from coordinator.methods.base import Method

TorchDevice: TypeAlias = "str | torch.device"
METHODS: PartRegistry[Method] = PartRegistry(
    "method", "register_method", "coordinator.methods", __file__
)
register_method = METHODS.register


def defaults_of(
    method: str,
    *,
    is_paper: bool = False,
    local: str = "",
    optimizer: str = "fedavgm",
    generator: str = "",
) -> dict[str, Any]:
    """Of a run's shared settings, by their paths. local: the optimizer of local steps, and
    generator, if they are not the method's own; optimizer: the server's. Raises ConfigError for
    unknown names, and for --paper where there is none."""
    entry = METHODS[method]
    if is_paper and not entry.paper:
        raise ConfigError(f"method {method!r} has no settings of a paper; leave --paper out")
    found = entry.paper if is_paper else entry.defaults
    filled = GENERATORS[generator or found.get("generator.name", "none")].defaults
    own = found.get("optimizer", "sgd")
    steps = LOCAL.get(local, {}) if local != own else {}  # another's rate would be none of its own
    return {**filled, **found, **steps, **(ADAPTIVE if optimizer != "fedavgm" else {})}


def make_config(
    method: str, model: ModelSpec, *, is_paper: bool = False, **settings: Any
) -> RunConfig:
    """A run's settings from Python, with the method's defaults as on the command line; what
    `settings` gives, a field or a whole part of RunConfig, stands."""
    plain = RunConfig(method=method, model=model, **settings)
    which = {"generator": plain.generator.name} if "generator" in settings else {}
    which |= {"local": plain.optimizer} if "optimizer" in settings else {}
    optimizer = plain.server.optimizer
    defaults = defaults_of(method, is_paper=is_paper, optimizer=optimizer, **which)
    given = settings.keys() | {f"own.{field}" for field in settings.get("own", {})}
    given -= {"own"}
    return changed(plain, {k: v for k, v in defaults.items() if not {k, k.split(".")[0]} & given})


def check_method(config: RunConfig) -> None:
    """Raise ConfigError for an unknown method, rule, generator or family, and for settings that the
    method has no place for: all that can be told before the data's shape is known."""
    from edge_sdk.models import find_family

    method = METHODS[config.method]
    METHODS.own(config.method, config.own)
    RULES.own(config.aggregation.rule, config.aggregation.own)
    GENERATORS.own(config.generator.name, config.generator.own)
    for path, flag in shared_flags().items():
        value = value_at(config, path)
        if not (flag.only or method.has_place(path) or value == flag.default):
            values = value if isinstance(value, tuple) else (value,)
            plain = ",".join(str(one) for one in values if isinstance(one, str | int | float))
            shown = f"{flag.name} {plain}".rstrip()
            raise ConfigError(
                f"method {config.method!r}: {shown} has no place there; leave it out, or choose "
                "another method (edge-coordinator methods)"
            )
    if config.model.adapters and not method.has_place("freeze"):
        raise ConfigError(
            f"method {config.method!r}: --adapt {config.model.adapters.kind} has no place there, "
            "as nothing is frozen; leave it out, or choose another (edge-coordinator methods)"
        )
    _check_task(config)
    if method.check:
        method.check(config)
    find_family(config.model.family)


def _check_task(config: RunConfig) -> None:
    """Raise ConfigError for what only makes sense for other tasks than the data's."""
    task = config.model.task
    parts: tuple[tuple[str, PartRegistry[Any], str], ...] = (
        ("--method", METHODS, config.method),
        ("--aggregation", RULES, config.aggregation.rule),
        ("--generator", GENERATORS, config.generator.name),
    )
    for flag, registry, name in parts:
        if task not in (known := registry[name].tasks):
            raise ConfigError(
                f"{flag} {name} is for the task {' or '.join(known)}, these data are for {task}; "
                "choose another (docs/tasks.md)"
            )
    default = METHODS[config.method].defaults.get("logit_adjustment", 0.0)
    if task not in ONLY_CLASSES and config.logit_adjustment not in (0.0, default):
        raise ConfigError(
            f"--logit-adjustment {config.logit_adjustment:g} is for classes, these data are for "
            f"{task}; leave it out"
        )


def make_method(config: RunConfig, device: TorchDevice = "cpu") -> Method:
    """The method that the settings name. Raises ConfigError as `check_method`, and for a model that
    cannot be built or trained."""
    from edge_sdk.models.checking import check_family

    check_method(config)
    with memory_errors(f"making {config.method} with generator {config.generator.name}"):
        check_family(config.model)
        return METHODS.make(config.method, config.own, config, device)
