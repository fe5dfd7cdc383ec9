"""edge-sdk: the device side of federated learning on unequal edge devices.

Importing this package loads nothing heavy; torch comes with `edge_sdk.training.trainer` and
`edge_sdk.models` only."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edge_sdk.version import __version__ as __version__

if TYPE_CHECKING:
    from edge_sdk.agent.events import Event
    from edge_sdk.client import Client

__all__ = ["Client", "Event"]
_HOMES = {"Client": "edge_sdk.client", "Event": "edge_sdk.agent.events"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
