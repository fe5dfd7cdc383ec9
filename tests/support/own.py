"""What users write, in tests: known in one test only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from coordinator.aggregation.registry import RULES
from coordinator.generators.registry import GENERATORS
from coordinator.methods.registry import METHODS
from edge_sdk.models import FAMILIES
from tests.support.processes import ROOT

EXAMPLES = ROOT / "examples"


@contextmanager
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is registered meanwhile is forgotten in the end; modules of examples/ are there to be
    imported, anew each time."""
    registries = (METHODS, RULES, GENERATORS, FAMILIES)
    before = [set(registry) for registry in registries]
    monkeypatch.syspath_prepend(EXAMPLES)
    for path in EXAMPLES.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry) - names:
            del registry._entries[name]
