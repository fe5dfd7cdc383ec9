"""Inputs of the fuzzer: where it begins, and changes that know what a message is made of.

A coverage-guided fuzzer that only flips bytes seldom gets past msgpack. These mutators change the
decoded map (a field's value, its name, its type, the message's tag) and pack it again; a third of
the changes are still made to the bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import msgpack

from edge_sdk.protocol.codec import encode
from edge_sdk.protocol.messages import (
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Message,
    Part,
    Probe,
    Ready,
    TensorSpec,
)
from tools.fuzz.fakes import SENDERS
from tools.fuzz.world import (
    NUM_ROUTES,
    ROUND,
    UNREACHABLE,
    Act,
    job_of,
    make_hello,
    make_update,
    parts_of,
    specs_of_update,
)

MutateBytes: TypeAlias = Callable[[bytes, int], bytes]
MAX_ACTS = 64
MAX_FRAME = 64 * 1024  # larger frames only cost time: the limits are tried by TOKENS
NUMBERS = (
    *(-1, 0, 1, 2, 3, 6, 7, 8, 100, 101, 1024, 1025),
    *(2**31, 2**31 + 1, 2**32, 2**48, 2**48 + 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
    *(-(2**31), -(2**63), -0.0, 0.5, 1e-320, 1e9, 1.1e9, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", "\0", "a\nb", "\x1b[2J", "\u2028", "\u202e", "é", "\U0001f6d1"),
    *("x" * length for length in (64, 65, 200, 201, 2000, 2001, 8001)),
    *("none", "round", "protocol", "late", "version"),
    *SENDERS,
    *("honest", "honest 0", "uploading 1", "float16", "weight"),
)
TAGS = (
    *("hello", "welcome", "ready", "job", "fetch", "part", "update", "accepted", "fault"),
    *("heartbeat", "bye", "probe"),
)


@lru_cache
def messages_of(name: str) -> list[Message]:
    """What a device of this name could mean, rightly or wrongly, in the round of the world."""
    update, specs = make_update(name), specs_of_update()
    wide = TensorSpec(name="w", shape=(2**40, 2**40), dtype="float64")
    return [
        make_hello(name),
        make_hello(name, round=ROUND, job=job_of(name).id),
        make_hello(name, round=ROUND, job=job_of(name).id, session="another"),
        make_hello(name, round=ROUND - 1, session="another"),
        make_hello(name, num_classes=4),
        Ready(exit=3),
        Ready(exit=2, stages=(3,), stage_s=(1.0,), prefix_s=1.0),
        Ready(exit=4),
        Fetch(round=ROUND, have=0, first=0, count=3),
        Fetch(round=ROUND, have=2**48, first=2**48, count=1024),
        Fetch(round=ROUND, have=3, first=3, count=0),
        *(Part(round=ROUND, index=index) for index in range(4)),
        update,
        make_update(name, round=ROUND - 1),
        make_update(name, tensors=specs[::-1]),
        make_update(name, tensors=(wide,)),
        make_update(name, num_examples=11, exits=()),
        make_update(name, job="0" * 32),
        make_update(name, digest="0" * 32),
        Fault(code="data", detail="no data", round=ROUND),
        Fault(code="protocol", detail="what?"),
        Heartbeat(round=ROUND),
        Heartbeat(),
        Bye(),
        Probe(),
    ]


def frames_of(name: str, message: Message) -> list[bytes]:
    if not isinstance(message, Part):
        return [encode(message)]
    parts = parts_of(name)
    return [encode(message), parts[min(message.index, len(parts) - 1)]]


def seeds_of_handler() -> list[bytes]:
    """Every message of every device alone, and devices that do what is expected of them."""
    seeds = []
    for place, name in enumerate(SENDERS):
        acts = [(2 * place, frames_of(name, message)) for message in messages_of(name)]
        seeds += [pack_acts([act]) for act in acts]
        update = (2 * place, frames_of(name, make_update(name)))
        parts = [act for act in acts if len(act[1]) == 2]
        seeds.append(pack_acts([update, *parts[:3]]))
        moved = [(route + 1, frames) for route, frames in (acts[1], update, *parts)]
        seeds.append(pack_acts(moved))
        seeds.append(pack_acts([(acts[0][0] + UNREACHABLE, acts[0][1]), update, *parts]))
    return seeds


def pack_acts(acts: Iterable[Act]) -> bytes:
    packed: bytes = msgpack.packb([[route, frames] for route, frames in acts])
    return packed


def unpack_acts(data: bytes) -> list[Act]:
    """What the bytes say; bytes that say nothing are one frame of a device."""
    try:
        acts = [
            (int(route) % NUM_ROUTES, [f for f in frames if isinstance(f, bytes)])
            for route, frames in msgpack.unpackb(data)
        ]
    except Exception:
        acts = [(len(data) % NUM_ROUTES, [data])]
    return acts[:MAX_ACTS]


# -- changes -----------------------------------------------------------------------------------


def mutate_acts(
    data: bytes, rng: random.Random, mutate_bytes: MutateBytes, pool: Sequence[bytes] = ()
) -> bytes:
    """A few changes of a sequence: what is said, by whom, in which order, how often."""
    acts = unpack_acts(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(acts)) if acts else 0
        match rng.randrange(8) if acts else 0:
            case 0 | 1:
                acts[place:place] = [some_act(rng, pool) for _ in range(rng.choice((1, 2, 8)))]
            case 2:
                del acts[place]
            case 3:
                acts.insert(rng.randrange(len(acts)), acts[place])
            case 4:
                acts[place] = (rng.randrange(NUM_ROUTES), acts[place][1])
            case 5:
                other = rng.randrange(len(acts))
                acts[place], acts[other] = acts[other], acts[place]
            case _:
                route, frames = acts[place]
                acts[place] = (route, _mutate_frames(frames, rng, mutate_bytes))
    return pack_acts(acts[-MAX_ACTS:])


def some_act(rng: random.Random, pool: Sequence[bytes] = ()) -> Act:
    """A message that could be meant, seldom one of `pool` or no frames: time passes."""
    place = rng.randrange(len(SENDERS))
    route = 2 * place + rng.choice((0, 0, 0, 1))
    if pool and rng.randrange(6) == 0:
        return route, [rng.choice(pool)]
    if rng.randrange(12) == 0:
        return route, []
    return route, frames_of(SENDERS[place], rng.choice(messages_of(SENDERS[place])))


def _mutate_frames(
    frames: list[bytes], rng: random.Random, mutate_bytes: MutateBytes
) -> list[bytes]:
    frames = list(frames) or [b""]
    match rng.randrange(10):
        case 0:
            frames.insert(
                rng.randrange(len(frames) + 1), rng.choice((b"", b"x" * 64, b"\xff" * 64))
            )
        case 1:
            del frames[rng.randrange(len(frames))]
        case 2:
            frames[-1] = mutate_bytes(frames[-1], 256)
        case _:
            frames[0] = mutate_frame(frames[0], rng, mutate_bytes)
    return frames or [b""]


def mutate_frame(
    data: bytes, rng: random.Random, mutate_bytes: MutateBytes, pool: Sequence[bytes] = ()
) -> bytes:
    """One change of a control frame, half of the time of one from `pool`: decoding happens in C,
    where coverage does not tell one message's type from another's."""
    if pool and rng.randrange(2):
        data = rng.choice(pool)
    try:
        plain = msgpack.unpackb(data, strict_map_key=False)
    except Exception:
        plain = None
    if not isinstance(plain, dict) or rng.randrange(3) == 0:
        return mutate_bytes(data, MAX_FRAME)
    try:
        if rng.randrange(12) == 0:
            return _twice(plain, rng)
        packed: bytes = msgpack.packb(mutate_value(plain, rng))
    except Exception:  # nothing msgpack can say, as a number beyond 64 bits
        return mutate_bytes(data, MAX_FRAME)
    return packed[:MAX_FRAME]


def _twice(plain: dict[Any, Any], rng: random.Random) -> bytes:
    """A map that has one key twice."""
    key = rng.choice(list(plain) or ["type"])
    pairs = [*plain.items(), (key, mutate_value(plain.get(key), rng))]
    body = b"".join(msgpack.packb(key) + msgpack.packb(value) for key, value in pairs)
    return b"\xde" + len(pairs).to_bytes(2, "big") + body


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Another value; of a map or list mostly the same with one change somewhere inside."""
    if isinstance(value, dict) and value and rng.randrange(10):
        return _mutate_map(value, rng)
    if isinstance(value, list) and value and rng.randrange(10):
        return _mutate_list(value, rng)
    if isinstance(value, bool) or value is None or rng.randrange(4) == 0:
        return _token(rng)
    if isinstance(value, int) and rng.randrange(2):
        return value + rng.choice((-1, 1, 2, -value, 2**31))
    if isinstance(value, int | float):
        return rng.choice(NUMBERS)
    if isinstance(value, str):
        return rng.choice((rng.choice(TEXTS), value + rng.choice(TEXTS), value[:-1], value * 2))
    return _token(rng)


def _mutate_map(value: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    value = dict(value)
    key = rng.choice(list(value))
    match rng.randrange(12):
        case 0:
            del value[key]
        case 1:
            value[rng.choice((*TEXTS, *value, "first", "last", 0, b"", None))] = _token(rng)
        case 2:
            value[rng.choice(TEXTS)] = value.pop(key)
        case 3:
            value["type"] = rng.choice(TAGS)
        case 4:
            other = rng.choice(list(value))
            value[key], value[other] = value[other], value[key]
        case _:
            value[key] = mutate_value(value[key], rng)
    return value


def _mutate_list(value: list[Any], rng: random.Random) -> list[Any]:
    value = list(value)
    place = rng.randrange(len(value))
    match rng.randrange(6):
        case 0:
            del value[place]
        case 1:
            value.insert(place, value[place])
        case 2:
            value = value * rng.choice((2, 5, 101))
        case 3:
            rng.shuffle(value)
        case _:
            value[place] = mutate_value(value[place], rng)
    return value[:20_000]


def _token(rng: random.Random) -> Any:
    match rng.randrange(6):
        case 0 | 1:
            return rng.choice(NUMBERS)
        case 2:
            return rng.choice(TEXTS)
        case 3:
            return rng.choice((None, True, False, [], {}, b"", b"x", [[]], {"a": {}}, [1, 1, 1]))
        case 4:
            nested: Any = 1
            for _ in range(rng.choice((2, 30, 400))):
                nested = [nested] if rng.randrange(2) else {"a": nested}
            return nested
        case _:
            return [rng.choice(NUMBERS)] * rng.choice((1, 8, 101))
