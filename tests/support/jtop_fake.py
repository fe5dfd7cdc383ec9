"""A made-up jetson-stats package for tests; the real one needs a Jetson."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest

from edge_sdk.hardware import jetson


class JtopException(Exception):
    pass


def fake_jtop(monkeypatch: pytest.MonkeyPatch, enter: Callable[[], object]) -> None:
    """`with jtop() as jetson` gives what enter() returns, or raises."""

    class Jtop:
        def __enter__(self) -> object:
            return enter()

        def __exit__(self, *_: object) -> None:
            return None

    module = types.ModuleType("jtop")
    module.jtop, module.JtopException = Jtop, JtopException  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jtop", module)
    jetson.jetson_module.cache_clear()


def refuses(error: Exception) -> Callable[[], object]:
    def enter() -> object:
        raise error

    return enter


def orin() -> types.SimpleNamespace:
    """An Orin Nano as jetson-stats 4.2 and later describe one."""
    return types.SimpleNamespace(
        board={"hardware": {"Module": "NVIDIA Jetson Orin Nano (8GB ram)"}},
        temperature={
            "cpu": {"temp": 51.5, "online": True},
            "gpu": {"temp": -256, "online": False},
        },
        power={"rail": {}, "tot": {"power": 5120, "avg": 5000}},
        gpu={"gpu": {"type": "integrated", "status": {"load": 12.5}}},
    )
