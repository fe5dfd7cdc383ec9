"""What can be named: model families, methods, generators, aggregation rules.

A file registers what it holds with a call at its top level, or a decorator:

    @register_method("fedavg-s")
    def fedavg_s(config, device): ...

Those of a package are found by reading its files for such lines: to import them all would take the
seconds of torch before `--help` is printed. A file is imported when one of its names is asked for.
What users write is registered when their module is imported (`--import MODULE`)."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from edge_sdk.errors import ConfigError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """kind: what the entries are, for messages. function: the name of the one that registers.
    package, folder: the built-in ones'. advice: what to do about an unknown name."""

    def __init__(
        self, kind: str, function: str, package: str, folder: Path, advice: str = ""
    ) -> None:
        self.kind = kind
        self._function = function
        self._package, self._folder = package, folder
        self._advice = advice
        self._entries: dict[str, Entry] = {}

    @cached_property
    def _modules(self) -> dict[str, str]:
        """The module that registers each built-in name."""
        line = re.compile(rf'^@?{self._function}\(\s*"([^"]+)"', re.MULTILINE)
        return {
            name: f"{self._package}.{file.stem}"
            for file in sorted(self._folder.glob("*.py"))
            for name in line.findall(file.read_text("utf-8"))
        }

    def __iter__(self) -> Iterator[str]:
        """All names, sorted."""
        return iter(sorted({*self._modules, *self._entries}))

    def __len__(self) -> int:
        return len({*self._modules, *self._entries})

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._entries

    def add(self, name: str, entry: Entry, module: str) -> None:
        """Raises ConfigError if the name is another module's."""
        if name in self._entries and self._entries[name] == entry:
            return
        if name in self._entries or self._modules.get(name, module) != module:
            step = f"choose another name in {module}"
            raise ConfigError(f"{self.kind} {name!r} is registered already; {step}")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        """Raises ConfigError, which lists the known names."""
        if name not in self:
            known = ", ".join(self)
            raise ConfigError(f"unknown {self.kind} {name!r}; known: {known}{self._advice}")
        if name not in self._entries:
            importlib.import_module(self._modules[name])
        return self._entries[name]
