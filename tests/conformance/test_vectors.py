"""The vectors are what our own code does, and what arithmetic of its own says: msgpack, hashlib and
numpy alone, or numbers by hand.

After a deliberate change: python -m tools.conformance --write-vectors"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import typing
from collections.abc import Callable
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
import zmq
from zmq.utils import z85

from edge_sdk.errors import ProtocolError
from edge_sdk.models import FAMILIES
from edge_sdk.protocol.codec import decode, encode
from edge_sdk.protocol.invitation import decode_line
from edge_sdk.protocol.link import parse_frames
from edge_sdk.protocol.messages import Message
from tests.support.reference_families import REFERENCES, cross_entropy
from tools.conformance.vectors import FOLDER, write_all


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def test_the_files_are_what_the_command_writes(tmp_path):
    """But for the last digits of a float, which may differ with the processor."""
    write_all(tmp_path)
    assert {path.name for path in FOLDER.glob("*.json")} == {
        path.name for path in tmp_path.iterdir()
    }
    for path in tmp_path.iterdir():
        new, held = json.loads(path.read_text()), read(path.stem)
        assert_same(new, held, path.name)


def assert_same(new: Any, held: Any, where: str) -> None:
    assert type(new) is type(held), where
    if isinstance(new, dict):
        assert list(new) == list(held), where
        for key in new:
            assert_same(new[key], held[key], f"{where}, {key}")
    elif isinstance(new, list):
        for place, (inner, other) in enumerate(zip(new, held, strict=True)):
            assert_same(inner, other, f"{where}[{place}]")
    elif isinstance(new, float):
        assert new == pytest.approx(held, rel=1e-3, abs=1e-5), where
    else:
        assert new == held, where


# -- messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", read("messages")["messages"], ids=lambda case: case["what"])
def test_a_message_has_these_bytes(case):
    data = bytes.fromhex(case["hex"])
    assert msgpack.packb(case["message"]).hex() == case["hex"]  # in the order of the file
    message = decode(data)
    want = case.get("is_read_as", case["message"])
    assert json.loads(json.dumps(msgspec.to_builtins(message))) == want
    if "is_read_as" not in case:
        assert encode(message) == data


def test_every_message_type_is_there_twice():
    tags = [case["message"]["type"] for case in read("messages")["messages"]]
    known = [kind.__struct_config__.tag for kind in typing.get_args(Message)]
    assert sorted(tags) == sorted(2 * known)


@pytest.mark.parametrize("case", read("frames")["messages"], ids=lambda case: case["what"])
def test_bad_frames_are_refused_with_this_fault(case):
    frames = [zmq.Frame(bytes.fromhex(frame)) for frame in case["frames"]]
    with pytest.raises(ProtocolError) as refused:
        parse_frames(frames)
    assert refused.value.code == case["fault"]


# -- streams ---------------------------------------------------------------------------------------


def test_the_short_stream_is_put_together_in_numpy():
    short, stream = read("stream")["short"], b""
    assert [spec["offset"] for spec in short["tensors"]] == [0, 8, 24, 32, 32, 40, 48, 56]
    for spec in short["tensors"]:
        stream += bytes(-len(stream) % 8)
        assert len(stream) == spec["offset"]
        values = np.array(spec["values"], np.dtype(spec["dtype"])).reshape(spec["shape"])
        stream += values.astype(values.dtype.newbyteorder("<")).tobytes()
    assert stream.hex() == short["hex"]
    assert len(stream) == short["total_bytes"] == 64
    assert hashlib.sha256(stream).hexdigest()[:32] == short["digest"]


def test_the_long_stream_is_cut_every_half_mebibyte():
    long = read("stream")["long"]
    stream = bytes((np.arange(long["total_bytes"], dtype=np.int64) ** 2 % 251).astype(np.uint8))
    parts = [stream[i : i + 524288] for i in range(0, len(stream), 524288)]
    assert [len(part) for part in parts] == [524288, 524288, 1000]
    told = [{"bytes": len(p), "sha256": hashlib.sha256(p).hexdigest()[:32]} for p in parts]
    assert long["parts"] == told
    assert long["digest"] == hashlib.sha256(stream).hexdigest()[:32]


def test_the_credit_trace_is_as_by_hand():
    """13 parts, 8 under way at most, more asked for at 4. After the link is lost with 6 parts here,
    7 are missing."""
    says = {
        "job": (0, 0, 8),
        "part 0": (1, 1, 0),
        "part 1": (2, 2, 0),
        "part 2": (3, 3, 0),
        "part 3": (4, 8, 4),  # 4 .. 7 under way
        "part 4": (5, 5, 0),  # 7 under way
        "part 5": (6, 6, 0),
        "welcome after a lost link": (6, 6, 7),
        "part 6": (7, 7, 0),
        "part 12": (13, 13, 0),
    }
    trace = read("credit")["trace"]
    told = {each["event"]: each["said"] for each in trace if each["said"]}
    for event, wanted in says.items():
        got = told[event]
        assert (got["have"], got["first"], got["count"]) == wanted, event
    assert [each["said"] for each in trace if each["event"] == "part 3"][1] is None  # it came twice
    assert sum(each["said"]["count"] for each in trace if each["said"]) == 8 + 4 + 7


# -- an invitation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", read("invitation")["invitations"])
def test_an_invitation_is_read_by_hand(case):
    mark, text = case["line"][:12], case["line"][12:]
    content = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    assert mark == "edge-join-1-"
    assert content[-4:] == hashlib.sha256(content[:-4]).digest()[:4]
    assert z85.encode(content[:32]).decode() == case["server_public_key"]
    assert z85.encode(content[32:64]).decode() == case["secret_key"]
    assert content[64:-4].decode() == f"{case['endpoint']} {case['name']}"
    assert zmq.curve_public(case["secret_key"].encode()).decode() == case["public_key"]
    line = decode_line(case["line"])
    assert (line.endpoint, line.name) == (case["endpoint"], case["name"])


# -- training --------------------------------------------------------------------------------------

CASES = read("training")["models"]


def arrays(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: array(tensor) for name, tensor in tensors.items()}


def array(tensor: dict[str, Any]) -> Any:
    return np.array(tensor["values"], np.float64).reshape(tensor["shape"])


def test_every_family_is_there():
    known = {name for name in FAMILIES if not FAMILIES[name].makes_any}
    assert {name.split()[0] for name in CASES} == known == set(REFERENCES)


FIELDS = read("training")["fields"]


@pytest.mark.parametrize("name", FIELDS["cases"])
def test_two_steps_by_a_plan_are_what_numpy_says(name):
    """In float64, gradients of the loss by central differences."""
    case, spec = FIELDS["cases"][name], FIELDS["model"]
    plan, job, own = case["plan"], arrays(case["job"]), arrays(case["kept_before"])
    x, y = array(FIELDS["inputs"]), np.array(FIELDS["labels"])
    names = [n for n in job if "/" not in n]
    start = {n: job[n] for n in names}
    w = dict(start)
    trained = [n for n in names if "running" not in n]
    counts = np.bincount(y, minlength=spec["num_classes"])
    prior = np.log((counts + 0.5) / (len(y) + 0.5 * len(counts)))
    forward = REFERENCES["mlp"]

    def adjusted(logits: Any) -> Any:
        logits = logits + plan["logit_adjustment"] * prior
        return np.where(counts == 0, 0.0, logits) if plan["mask_absent"] else logits

    def loss(w: dict[str, Any], taught: Any) -> float:
        exits = forward(w, x, True, {}, spec)
        both = sum(
            e * cross_entropy(adjusted(z), y) for e, z in zip((0.5, 1.0), exits, strict=True)
        )
        if plan["distill"] != "none":  # exit 2 teaches exit 1, which weighs 0.5
            p, log_p = np.exp(log_softmax(taught)), log_softmax(exits[0])
            apart = (p * (log_softmax(taught) - log_p)).sum(1).mean()
            both += plan["distill_weight"] * 0.5 * apart
        return float(both)

    for _ in range(2):
        after: dict[str, Any] = {}
        taught = forward(w, x, True, after, spec)[1]
        gradients = {n: slope(lambda w: loss(w, taught), w, n) for n in trained}  # noqa: B023
        for n, g in gradients.items():
            g += plan["prox_mu"] * (w[n] - start[n])
            if plan["dyn_alpha"]:
                g += plan["dyn_alpha"] * (w[n] - start[n]) - own[f"dyn/{n}"]
            if plan["clip_value"]:
                np.clip(g, -plan["clip_value"], plan["clip_value"], out=g)
        if plan["clip_norm"]:
            norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
            for g in gradients.values():
                g *= min(1.0, plan["clip_norm"] / (norm + 1e-6))
        for n, g in gradients.items():
            if plan["correction"]:
                g += job[f"correction/{n}"] - own[f"correction/{n}"]
            w[n] = w[n] - plan["lr"] * (g + plan["weight_decay"] * w[n])
        if not plan["static_norm"]:
            w |= after
    if plan["mask_absent"]:
        for n in (n for n in trained if n.startswith("exits")):
            w[n] = np.where((counts == 0).reshape(-1, *[1] * (w[n].ndim - 1)), start[n], w[n])
    if plan["static_norm"]:  # of the one batch: the step from 0 has 0.1 of its own
        after = {n: 0 * w[n] for n in names if "running" in n}
        zeroed: dict[str, Any] = {}
        forward(w | after, x, True, zeroed, spec)
        w |= {n: value / 0.1 for n, value in zeroed.items()}
    wanted = dict(w)
    kept = dict(own)
    for n in trained:
        if plan["correction"]:
            change = (start[n] - w[n]) / (2 * plan["lr"]) - job[f"correction/{n}"]
            wanted[f"correction/{n}"] = change
            kept[f"correction/{n}"] = own[f"correction/{n}"] + change
        if plan["dyn_alpha"]:
            kept[f"dyn/{n}"] = own[f"dyn/{n}"] - plan["dyn_alpha"] * (w[n] - start[n])
    for got, want in ((arrays(case["update"]), wanted), (arrays(case["kept_after"]), kept)):
        assert set(got) == set(want)
        for n, value in want.items():
            np.testing.assert_allclose(got[n], value, atol=3e-5, rtol=1e-3, err_msg=n)


def slope(loss: Callable[[dict[str, Any]], float], w: dict[str, Any], name: str) -> Any:
    """By central differences."""
    found = np.zeros_like(w[name])
    for place in np.ndindex(*found.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = w | {name: w[name].copy()}
            moved[name][place] += step
            sides.append(loss(moved))
        found[place] = (sides[0] - sides[1]) / 2e-6
    return found


def log_softmax(z: Any) -> Any:
    return (
        z
        - z.max(1, keepdims=True)
        - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
    )


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_what_numpy_says(name):
    """Forward in float64, the gradient by central differences, Adam's first step by its formula:
    m / (1 - 0.9) = g, v / (1 - 0.999) = g^2, so w - lr g / (|g| + 1e-8)."""
    case, plan = CASES[name], read("training")["plan"]
    reference, spec = REFERENCES[case["model"]["family"]], case["model"]
    w, x, y = arrays(case["tensors"]), array(case["inputs"]), np.array(case["labels"])
    e1, e2 = plan["exit_weights"]

    def losses(w: dict[str, Any], after: dict[str, Any]) -> list[float]:
        return [cross_entropy(z, y) for z in reference(w, x, True, after, spec)]

    evaluated = reference(w, x, False, {}, spec)
    for got, want in zip(case["logits_in_evaluation"], evaluated, strict=True):
        np.testing.assert_allclose(array(got), want, atol=2e-6, rtol=1e-5)
    after: dict[str, Any] = {}
    trained = reference(w, x, True, after, spec)
    for got, want in zip(case["logits_in_training"], trained, strict=True):
        np.testing.assert_allclose(array(got), want, atol=2e-5, rtol=1e-4)
    each = losses(w, {})
    np.testing.assert_allclose(case["loss_of_each_exit"], each, rtol=1e-4)
    assert case["loss"] == pytest.approx(e1 * each[0] + e2 * each[1], rel=1e-4)
    got_after, gradients = arrays(case["tensors_after"]), arrays(case["gradients"])  # null: NaN
    for tensor, statistics in after.items():
        np.testing.assert_allclose(got_after[tensor], statistics, rtol=1e-5, atol=1e-6)
    assert set(w) == set(gradients) | set(after) == set(got_after)
    for tensor, told in gradients.items():
        found = np.zeros_like(told)
        for place in np.ndindex(*told.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = w | {tensor: w[tensor].copy()}
                moved[tensor][place] += step
                first, second = losses(moved, {})
                sides.append(e1 * first + e2 * second)
            found[place] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(told, found, atol=2e-5, rtol=1e-3)
        moves = np.abs(found) > 1e-4  # below it Adam turns a rounding into a whole step
        wanted = w[tensor] - plan["lr"] * found / (np.abs(found) + 1e-8)
        np.testing.assert_allclose(got_after[tensor][moves], wanted[moves], atol=1e-6)
        assert (np.isnan(got_after[tensor]) == (np.abs(told) <= 1e-5)).all()


def test_hex_of_a_float_is_a_float_64():
    """0.5 of `loss` in the update, by hand: cb and the big-endian IEEE 754 number."""
    case = next(c for c in read("messages")["messages"] if c["what"] == "update, all fields")
    assert f"a46c6f7373cb{struct.pack('>d', 0.5).hex()}" in case["hex"]
