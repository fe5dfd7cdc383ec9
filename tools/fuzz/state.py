"""A coordinator's state as bytes, to see whether a message changed it, where, and whose part.

Attributes are walked without knowing them, so that this survives any rewrite of the coordinator:
records, containers and our own objects are opened, tensors stand for a digest, and what is foreign
(a socket, a thread, a function) is no state of ours. The walk is msgspec's, in C: a snapshot is
taken after every one of a million inputs, and most change nothing.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any, TypeAlias

import msgpack
import msgspec
import torch

Place: TypeAlias = tuple[Any, ...]
OURS = ("coordinator", "edge_sdk")
ABSENT = "(nothing)"


def snapshot_state(root: object, leave_out: Collection[str] = ()) -> bytes:
    """Equal for equal states. leave_out: attributes and classes of ours that are no state. Raises
    RecursionError where objects point back to one that they are in."""
    digests: dict[int, Any] = {}  # tensors of a job are shared

    def attributes(value: Any) -> Any:
        """Of what msgspec does not know."""
        kind = type(value)
        if isinstance(value, torch.Tensor):
            if id(value) not in digests:
                raw = value.numpy(force=True)
                digests[id(value)] = [str(raw.dtype), raw.shape, zlib.crc32(raw.tobytes())]
            return digests[id(value)]
        if isinstance(value, deque):
            return list(value)
        if isinstance(value, range):
            return repr(value)
        if not kind.__module__.startswith(OURS) or kind.__name__ in leave_out:
            return kind.__name__
        slots = [name for cls in kind.__mro__ for name in getattr(cls, "__slots__", ())]
        items = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        items |= getattr(value, "__dict__", {})
        return {name: child for name, child in items.items() if name not in leave_out}

    return msgspec.msgpack.encode(root, enc_hook=attributes)


def changes(before: bytes, after: bytes) -> dict[Place, tuple[Any, Any]]:
    """Places that differ, with what was there and what is."""
    if before == after:
        return {}
    old, new = (msgpack.unpackb(state, strict_map_key=False) for state in (before, after))
    return dict(_differences(old, new, ()))


def is_owned(place: Place, values: tuple[Any, Any], names: Collection[Any]) -> bool:
    """Whether what is there belongs to the client with these names and routes: they lead to it, or
    it is one of them."""
    return not set(place).isdisjoint(names) or all(value in (ABSENT, *names) for value in values)


def shown(found: dict[Place, tuple[Any, Any]], most: int = 5) -> str:
    """The first few differences, for a report."""
    lines = [
        f"{'.'.join(map(str, place))}: {old!r:.200} -> {new!r:.200}"
        for place, (old, new) in sorted(found.items(), key=str)
    ]
    return "; ".join(lines[:most])


def _differences(old: Any, new: Any, place: Place) -> Iterator[tuple[Place, tuple[Any, Any]]]:
    if old == new:
        return
    if isinstance(old, list) and isinstance(new, list):
        old = {_about(item, index): item for index, item in enumerate(old)}
        new = {_about(item, index): item for index, item in enumerate(new)}
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key, ABSENT), new.get(key, ABSENT), (*place, key))
    elif repr(old) != repr(new):  # a NaN equals its repr only
        yield place, (old, new)


def _about(item: Any, index: int) -> Any:
    """What is in a list goes by the client that it is about, where it is about one."""
    if isinstance(item, str | bytes):
        return item
    client = item.get("client", item) if isinstance(item, dict) else None
    return client.get("id", index) if isinstance(client, dict) else index
