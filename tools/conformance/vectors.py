"""Neutral vectors for a device in another language: JSON files with the bytes of every message, bad
frames, a stream, a credit trace and an invitation. training_vectors.py adds what training gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import msgpack
import msgspec
import torch
import zmq
from msgspec.structs import fields

from edge_sdk.protocol.codec import decode, encode
from edge_sdk.protocol.invitation import InvitationLine, encode_line
from edge_sdk.protocol.messages import PROTOCOL, Fetch, Message
from edge_sdk.protocol.stream import PART_BYTES, digest_of, layout, num_parts, part_size
from edge_sdk.protocol.tensors import Receiver, Sender, specs_of
from tools.conformance.bad_frames import BAD_FRAMES, OTHER_VERSION
from tools.conformance.bed import WINDOW
from tools.conformance.training_vectors import training

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "conformance"
GOLDEN = ROOT / "tests" / "golden"


def messages() -> dict[str, Any]:
    """Every type twice: with all of its fields, and with those alone that have no default."""
    told = []
    for kind in get_args(Message):
        tag = kind.__struct_config__.tag
        full = decode((GOLDEN / f"{tag}.msgpack").read_bytes())
        plain = msgspec.to_builtins(full)
        told.append({"what": f"{tag}, all fields", "message": plain, "hex": encode(full).hex()})
        required = {field.encode_name for field in fields(kind) if field.required} | {"type"}
        least = {key: value for key, value in plain.items() if key in required}
        read = msgspec.to_builtins(decode(msgpack.packb(least)))
        told.append(
            {
                "what": f"{tag}, required fields",
                "message": least,
                "hex": msgpack.packb(least).hex(),
                "is_read_as": read,
            }
        )
    return {"protocol": PROTOCOL, "messages": told}


def frames() -> dict[str, Any]:
    told = []
    for code, cases in (("protocol", BAD_FRAMES), ("version", OTHER_VERSION)):
        for what, parts in cases.items():
            told.append({"what": what, "frames": [part.hex() for part in parts], "fault": code})
    return {"messages": told}


def stream() -> dict[str, Any]:
    """A short stream with every dtype, written out, and a long one, told by a rule."""
    tensors = {
        "uint8": torch.tensor([1, 2, 255], dtype=torch.uint8),
        "float32": torch.tensor([[1.0, -2.0], [0.5, 3.25]]),
        "scalar int64": torch.tensor(-2),
        "empty float32": torch.zeros(0, 3),
        "bool": torch.tensor([True, False, True]),
        "float16": torch.tensor([1.5, -0.25], dtype=torch.float16),
        "int32": torch.tensor([7, -7], dtype=torch.int32),
        "float64": torch.tensor([0.1], dtype=torch.float64),
    }
    sender = Sender(tensors)
    offsets, total_bytes, _ = layout(sender.specs)
    told = [
        msgspec.to_builtins(spec) | {"values": tensors[spec.name].tolist(), "offset": offset}
        for spec, offset in zip(sender.specs, offsets, strict=True)
    ]
    size = 2 * PART_BYTES + 1000
    long = bytes(i * i % 251 for i in range(size))
    parts = [long[i * PART_BYTES :][: part_size(size, i)] for i in range(num_parts(size))]
    return {
        "short": {
            "tensors": told,
            "total_bytes": total_bytes,
            "hex": bytes(sender.part(0)).hex(),
            "digest": sender.digest(),
        },
        "kept": kept(),
        "long": {
            "rule": "byte i is i * i % 251",
            "total_bytes": size,
            "digest": digest_of([long]),
            "parts": [{"bytes": len(part), "sha256": digest_of([part])} for part in parts],
        },
    }


def kept() -> dict[str, Any]:
    """The stream of a job with frozen tensors, all of whose parts are told, and what a device that
    keeps some of them asks for first."""
    tensors = {
        "stages.0.w": torch.zeros(PART_BYTES // 4),
        "stages.1.w": torch.zeros(PART_BYTES // 2),
        "exits.1.w": torch.zeros(10),
    }
    digests = {name: Sender({name: tensors[name]}).digest() for name in list(tensors)[:2]}
    sender = Sender(tensors, digests=digests)
    found = []
    for held in ([], [1], [2], [1, 2]):
        receiver = Receiver(sender.specs)
        receiver.skip(held)
        have = receiver.num_received
        first, count = receiver.next_request(WINDOW) or (have, 0)
        names = [sender.specs[number].name for number in held]
        found.append({"kept": names, "have": have, "first": first, "count": count})
    return {
        "tensors": [msgspec.to_builtins(spec) for spec in sender.specs],
        "offsets": list(sender.offsets),
        "total_bytes": sender.total_bytes,
        "parts": [len(sender.part(index)) for index in range(sender.num_parts)],
        "fetches": found,
    }


def credit() -> dict[str, Any]:
    """What a device says in a download of 13 parts, as its parts come: one is lost with the link,
    one comes twice."""
    specs = specs_of({"w": torch.zeros(13 * PART_BYTES // 4)})
    receiver, round, trace = Receiver(specs), 7, []

    def tell(event: str, *, asks: bool = True) -> None:
        said: dict[str, Any] | None = None
        if asks:
            have = receiver.num_received
            first, count = receiver.next_request(WINDOW) or (have, 0)
            said = msgspec.to_builtins(Fetch(round=round, have=have, first=first, count=count))
        trace.append({"event": event, "said": said})

    def take(index: int) -> None:
        size = part_size(receiver.total_bytes, index)
        tell(f"part {index}", asks=receiver.add(index, bytes(size)))

    tell("job")
    for index in (0, 1, 2, 3, 3, 4, 5):
        take(index)
    receiver.restart()
    tell("welcome after a lost link")
    for index in range(6, 13):
        take(index)
    return {"parts": receiver.num_parts, "window": WINDOW, "trace": trace}


def invitation() -> dict[str, Any]:
    """A line for one device, one for any; the keys are of this file and of no coordinator."""
    server_key = b"Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
    secret = b"JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"
    told = []
    for name in ("pi-1", ""):
        line = InvitationLine("tcp://192.168.1.5:5555", name, server_key, secret)
        told.append(
            {
                "line": encode_line(line),
                "endpoint": line.endpoint,
                "name": name,
                "server_public_key": server_key.decode(),
                "secret_key": secret.decode(),
                "public_key": zmq.curve_public(secret).decode(),
            }
        )
    return {"invitations": told}


def write_all(folder: Path = FOLDER) -> None:
    """Write every file anew."""
    folder.mkdir(parents=True, exist_ok=True)
    made = (messages, frames, stream, credit, invitation, training)
    for make in made:
        text = json.dumps(make(), indent=1)
        (folder / f"{make.__name__}.json").write_text(compact(text) + "\n")


def compact(text: str) -> str:
    """The JSON with every innermost array of numbers on one line."""
    return re.sub(r"\[(?:[-+\d.e,\s]|null)*\]", lambda found: " ".join(found[0].split()), text)
