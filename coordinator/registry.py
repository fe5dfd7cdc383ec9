"""What a file of a method, an aggregation rule or a generator registers beside its function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from coordinator.config import Options, Own, RunConfig
from coordinator.settings import own_options
from edge_sdk.helpers.registry import Registry
from edge_sdk.protocol.fields import Task
from edge_sdk.tasks.metrics import METRICS

Made = TypeVar("Made")
Make = TypeVar("Make", bound=Callable[..., Any])


# Shared settings, by path or part of RunConfig, that only count with a method that `uses` them.
OPT_IN = ("rotation", "generator", "server.damping", "backbones")


@dataclass(frozen=True)
class OnDevice:
    """What a method asks of a device, for people. fits: how its model is made to fit there. memory,
    traffic: of training and each way, as formulas; cli/methods.py says of what. keeps: what stays
    there from round to round."""

    fits: str
    memory: str
    traffic: str
    keeps: str = "nothing"


@dataclass(frozen=True)
class Registered(Generic[Made]):
    """make: the function; its options are the last thing that it is given, if it has any.
    options: what it has of its own; each field with its default, bounds and help is a flag.
    defaults: of shared settings by their paths, e.g. "server.lr", where nothing else is asked for.
    paper: instead of them with --paper, of a method's own by "own.FIELD" too. check: raises
    ConfigError for settings that do not go with it.

    Of a method: uses, without: the shared settings that it has a place for of OPT_IN, and has none
    for of all others, by their paths or whole parts, e.g. "server". is_personal: it may have a
    model of its own for each client. tasks: of a model's outputs, that it makes sense for."""

    make: Callable[..., Made]
    options: type[Options] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    uses: Collection[str] = ()
    without: Collection[str] = ()
    check: Callable[[RunConfig], None] | None = None
    on_device: OnDevice | None = None
    is_personal: bool = False
    tasks: Collection[Task] = tuple(METRICS)

    @property
    def about(self) -> str:
        """What it does, in one line: the first paragraph of its function's docstring."""
        return " ".join((self.make.__doc__ or "").split("\n\n")[0].split())

    def has_place(self, path: str) -> bool:
        """Whether a shared setting, e.g. "server.lr", counts with this method."""
        names = {path, path.partition(".")[0]}
        is_wanted = not names & set(OPT_IN) or bool(names & set(self.uses))
        return is_wanted and not names & set(self.without)


class PartRegistry(Registry[Registered[Made]]):
    """All methods, or all rules, or all generators; built-in ones lie beside `file`."""

    def __init__(self, kind: str, function: str, package: str, file: str) -> None:
        advice = "; load your own with --import MODULE"
        super().__init__(kind, function, package, Path(file).parent, advice)

    def register(
        self,
        name: str,
        *,
        options: type[Options] | None = None,
        defaults: Mapping[str, Any] | None = None,
        paper: Mapping[str, Any] | None = None,
        uses: Collection[str] = (),
        without: Collection[str] = (),
        check: Callable[[RunConfig], None] | None = None,
        on_device: OnDevice | None = None,
        is_personal: bool = False,
        tasks: Collection[Task] = tuple(METRICS),
    ) -> Callable[[Make], Make]:
        """Decorates the function; see Registered. Raises ConfigError for a name that is taken."""

        def decorate(make: Make) -> Make:
            entry = Registered(
                make,
                options,
                defaults or {},
                paper or {},
                uses,
                without,
                check,
                on_device,
                is_personal,
                tasks,
            )
            self.add(name, entry, make.__module__)
            return make

        return decorate

    def own(self, name: str, given: Own) -> tuple[Options, ...]:
        """Its options as the last arguments of its function: one struct, or none. Raises
        ConfigError for options that it does not have, and values out of range."""
        return own_options(given, self[name].options, f"{self.kind} {name!r}")

    def make(self, name: str, given: Own, *arguments: Any) -> Made:
        """Raises ConfigError, also for an unknown name."""
        return self[name].make(*arguments, *self.own(name, given))
