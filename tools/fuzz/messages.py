"""Strategies for every message, derived from its declaration: a new message, field or limit is
covered without a line here."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

import msgspec.inspect as kinds
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.codec import encode
from edge_sdk.protocol.messages import PROTOCOL, Message

Strategy: TypeAlias = st.SearchStrategy[Any]
CHARACTERS = st.characters(exclude_categories=["Cs"])  # a surrogate is no UTF-8
FIELDS: dict[str, Strategy] = {"protocol": st.just(PROTOCOL)}  # other versions are told apart


def strategies(union: Any = Message) -> dict[str, Strategy]:
    """Name of every message of a union to its strategy. Those that travel fit into a frame: a
    declaration bounds each list, and not all of them together."""
    info = kinds.type_info(union)
    assert isinstance(info, kinds.UnionType)
    found = {
        member.cls.__name__: strategy_of(member)
        for member in info.types
        if isinstance(member, kinds.StructType)
    }
    if union is not Message:
        return found
    return {name: strategy.filter(_travels) for name, strategy in found.items()}


def _travels(message: Message) -> bool:
    try:
        encode(message)
    except ProtocolError:
        return False
    return True


def drawn_frames(each: int, number: int) -> list[bytes]:
    """`each` encoded messages of every type; the same for the same number."""
    frames = []

    def take(message: Message) -> None:
        frames.append(encode(message))

    options = settings(
        max_examples=each,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    for strategy in strategies().values():
        seed(number)(options(given(strategy)(take)))()
    return frames


def strategy_of(info: kinds.Type) -> Strategy:
    """Values that a declaration lets through. Raises TypeError for a kind not met so far."""
    match info:
        case kinds.StructType() | kinds.DataclassType():
            fields = {f.name: FIELDS.get(f.name, strategy_of(f.type)) for f in info.fields}
            return st.builds(info.cls, **fields)
        case kinds.UnionType():
            return st.one_of([strategy_of(member) for member in info.types])
        case kinds.IntType():
            return _integers(info)
        case kinds.FloatType():
            return _floats(info)
        case kinds.StrType():
            return _texts(info)
        case kinds.VarTupleType():
            # Drawing many items is slow: long ones repeat one, of structs so few that they travel.
            items, most = strategy_of(info.item_type), info.max_length or 8
            often = 10 if isinstance(info.item_type, kinds.StructType) else 100
            few = st.lists(items, min_size=info.min_length or 0, max_size=min(most, 4))
            long = st.tuples(items, st.integers(info.min_length or 0, min(most, often)))
            return few.map(tuple) | long.map(lambda pair: (pair[0],) * pair[1])
        case kinds.DictType():
            keys, values = strategy_of(info.key_type), strategy_of(info.value_type)
            return st.dictionaries(keys, values, max_size=min(info.max_length or 4, 4))
        case kinds.LiteralType():
            return st.sampled_from(info.values)
        case kinds.BoolType():
            return st.booleans()
        case kinds.NoneType():
            return st.none()
    raise TypeError(f"no strategy for {type(info).__name__}; add one to tools/fuzz/messages.py")


def _integers(info: kinds.IntType) -> Strategy:
    """What has no limit has those of msgpack."""
    above = None if info.gt is None else info.gt + 1
    below = None if info.lt is None else info.lt - 1
    lows = [-(2**63), *(limit for limit in (info.ge, above) if limit is not None)]
    highs = [2**64 - 1, *(limit for limit in (info.le, below) if limit is not None)]
    least, most = max(lows), min(highs)
    return st.integers(least, most) | st.sampled_from((least, most))


def _floats(info: kinds.FloatType) -> Strategy:
    least = info.ge if info.ge is not None else info.gt
    most = info.le if info.le is not None else info.lt
    return st.floats(
        least,
        most,
        exclude_min=info.gt is not None,
        exclude_max=info.lt is not None,
        allow_nan=least is None and most is None,
    )


def _texts(info: kinds.StrType) -> Strategy:
    least, most = info.min_length or 0, info.max_length or 10_000
    if info.pattern is None:
        return st.text(CHARACTERS, min_size=least, max_size=most)
    pattern = re.compile(info.pattern)
    made = st.from_regex(pattern, alphabet=CHARACTERS)
    repeated = st.tuples(made, st.integers(0, 2)).map(
        lambda pair: (pair[0] * most)[: most - pair[1]]
    )
    return (made | repeated).filter(
        lambda text: least <= len(text) <= most and pattern.search(text)
    )
