"""Fields of messages: unknown, missing, of a wrong type, out of range; each is refused with its
place."""

from __future__ import annotations

import math

import msgpack
import pytest

from edge_sdk.protocol.codec import decode
from tests.support.frames import GOOD, HEX, INF, MODEL, NAN, PLAN, PROFILE, SPEC, frame, refused


@pytest.mark.parametrize("plain", [None, 1, "hello", [], [1], {}, {"round": 1}, {"type": None}])
def test_what_is_not_a_tagged_map_is_refused(plain):
    refused(msgpack.packb(plain))


@pytest.mark.parametrize("tag", ["", "helo", "Hello", "inspected", "cancel", 1, None, ["bye"]])
def test_unknown_types_are_refused(tag):
    assert "$.type" in refused(msgpack.packb({"type": tag}))


@pytest.mark.parametrize("tag", GOOD)
def test_unknown_fields_are_refused(tag):
    assert "unknown field `surprise`" in refused(frame(tag, surprise=1))


def test_unknown_fields_inside_are_refused():
    assert "$.plan" in refused(frame("job", plan={**PLAN, "surprise": 1}))
    assert "$.tensors[0]" in refused(frame("job", tensors=[{**SPEC, "surprise": 1}]))
    assert "$.profile" in refused(frame("hello", profile={**PROFILE, "surprise": 1}))


@pytest.mark.parametrize(("tag", "field"), [(t, f) for t, fields in GOOD.items() for f in fields])
def test_missing_fields_are_refused(tag, field):
    rest = {key: value for key, value in GOOD[tag].items() if key != field}
    assert f"missing required field `{field}`" in refused(msgpack.packb({"type": tag, **rest}))


@pytest.mark.parametrize(
    ("tag", "changes", "path"),
    [
        # wrong type
        ("accepted", {"round": "1"}, "$.round"),
        ("accepted", {"round": 1.0}, "$.round"),
        ("accepted", {"round": True}, "$.round"),
        ("accepted", {"round": None}, "$.round"),
        ("accepted", {"round": [1]}, "$.round"),
        ("bye", {"reason": b""}, "$.reason"),
        ("bye", {"reason": None}, "$.reason"),
        ("bye", {"reason": 1}, "$.reason"),
        ("hello", {"profile": []}, "$.profile"),
        ("hello", {"profile": {**PROFILE, "is_emulated": 1}}, "$.profile.is_emulated"),
        ("job", {"tensors": SPEC}, "$.tensors"),
        ("job", {"tensors": [{**SPEC, "shape": 6}]}, "$.tensors[0].shape"),
        ("job", {"tensors": [{**SPEC, "shape": [2.0]}]}, "$.tensors[0].shape[0]"),
        ("job", {"model": {**MODEL, "options": {"a": {}}}}, "$.model.options"),
        ("update", {"phases": []}, "$.phases"),
        ("ready", {"stages": msgpack.ExtType(1, b"")}, "$.stages"),
        # out of range
        ("accepted", {"round": 0}, "$.round"),
        ("accepted", {"round": -1}, "$.round"),
        ("accepted", {"round": 2**31 + 1}, "$.round"),
        ("accepted", {"round": 2**64 - 1}, "$.round"),
        ("fetch", {"first": -1}, "$.first"),
        ("fetch", {"count": -1}, "$.count"),
        ("fetch", {"have": -1}, "$.have"),
        ("job", {"id": "a" * 31}, "$.id"),
        ("job", {"id": "A" * 32}, "$.id"),
        ("job", {"id": HEX + "\n"}, "$.id"),
        ("update", {"job": ""}, "$.job"),
        ("update", {"digest": "a" * 33}, "$.digest"),
        ("hello", {"job": "none"}, "$.job"),
        ("fetch", {"count": 1025}, "$.count"),
        ("part", {"index": 2**48 + 1}, "$.index"),
        ("ready", {"exit": 101}, "$.exit"),
        ("ready", {"reason": "x" * 2001}, "$.reason"),
        ("hello", {"client_id": ""}, "$.client_id"),
        ("hello", {"client_id": "-a"}, "$.client_id"),
        ("hello", {"client_id": "a b"}, "$.client_id"),
        ("hello", {"client_id": "a" * 65}, "$.client_id"),
        ("hello", {"client_id": "../a"}, "$.client_id"),
        ("hello", {"client_id": "a\n"}, "$.client_id"),
        ("hello", {"num_examples": 0}, "$.num_examples"),
        ("hello", {"num_examples": 2**31 + 1}, "$.num_examples"),
        ("hello", {"input_shape": []}, "$.input_shape"),
        ("hello", {"input_shape": [1] * 5}, "$.input_shape"),
        ("hello", {"round": 2**31 + 1}, "$.round"),
        ("ready", {"stages": [1] * 101}, "$.stages"),
        ("update", {"exits": [{"exit": 1, "loss": 0.5, "metric": 1.0}] * 101}, "$.exits"),
        ("job", {"plan": {**PLAN, "exit_weights": [1.0] * 101}}, "$.plan.exit_weights"),
        ("job", {"plan": {**PLAN, "distill": "both"}}, "$.plan.distill"),
        ("job", {"plan": {**PLAN, "distill_weight": -0.5}}, "$.plan.distill_weight"),
        ("job", {"plan": {**PLAN, "distill_temperature": 0.0}}, "$.plan.distill_temperature"),
        ("job", {"plan": {**PLAN, "distill_temperature": 1001}}, "$.plan.distill_temperature"),
        ("ready", {"exit": 1, "stages": [2], "stage_s": [-1.0]}, "$.stage_s[0]"),
        ("hello", {"session": ""}, "$.session"),
        ("hello", {"session": "s" * 201}, "$.session"),
        ("welcome", {"heartbeat_s": 0.0}, "$.heartbeat_s"),
        ("welcome", {"heartbeat_s": 3601.0}, "$.heartbeat_s"),
        ("job", {"model": {**MODEL, "width": 0.0}}, "$.model.width"),
        ("job", {"model": {**MODEL, "width": 1.5}}, "$.model.width"),
        ("job", {"model": {**MODEL, "input_shape": []}}, "$.model.input_shape"),
        ("job", {"model": {**MODEL, "input_shape": [1] * 5}}, "$.model.input_shape"),
        ("job", {"plan": {"segments": []}}, "$.plan.segments"),
        ("job", {"plan": {**PLAN, "batch_size": 1}}, "$.plan.batch_size"),
        ("job", {"plan": {**PLAN, "lr": 0.0}}, "$.plan.lr"),
        ("job", {"plan": {**PLAN, "momentum": 1.0}}, "$.plan.momentum"),
        ("job", {"plan": {**PLAN, "seed": 2**62}}, "$.plan.seed"),
        ("job", {"plan": {**PLAN, "optimizer": "lion"}}, "$.plan.optimizer"),
        ("job", {"tensors": [{**SPEC, "shape": [1] * 9}]}, "$.tensors[0].shape"),
        ("job", {"tensors": [{**SPEC, "shape": [-1]}]}, "$.tensors[0].shape[0]"),
        ("job", {"tensors": [{**SPEC, "dtype": "complex64"}]}, "$.tensors[0].dtype"),
        ("job", {"tensors": [{**SPEC, "role": "gift"}]}, "$.tensors[0].role"),
        ("job", {"tensors": [{**SPEC, "name": "w" * 201}]}, "$.tensors[0].name"),
        ("update", {"phases": {"upload": {"wall_s": 1.0}}}, "$.phases"),
        # NaN and infinity
        ("welcome", {"deadline_s": NAN}, "$.deadline_s"),
        ("welcome", {"heartbeat_s": NAN}, "$.heartbeat_s"),
        ("welcome", {"heartbeat_s": INF}, "$.heartbeat_s"),
        ("job", {"deadline_s": NAN}, "$.deadline_s"),
        ("job", {"deadline_s": -1.0}, "$.deadline_s"),
        ("job", {"plan": {**PLAN, "lr": NAN}}, "$.plan.lr"),
        ("job", {"plan": {**PLAN, "prox_mu": NAN}}, "$.plan.prox_mu"),
        ("job", {"plan": {**PLAN, "exit_weights": [1.0, NAN]}}, "$.plan.exit_weights[1]"),
        ("update", {"phases": {"train": {"wall_s": NAN}}}, "$.phases[...].wall_s"),
        (
            "update",
            {"exits": [{"exit": 1, "loss": 0.5, "metric": NAN}]},
            "$.exits[0].metric",
        ),
        ("job", {"deadline_s": INF}, "$.deadline_s"),
        ("job", {"deadline_s": 1.1e9}, "$.deadline_s"),
        ("job", {"plan": {**PLAN, "lr": INF}}, "$.plan.lr"),
        ("job", {"plan": {**PLAN, "momentum": INF}}, "$.plan.momentum"),
        ("job", {"plan": {**PLAN, "weight_decay": INF}}, "$.plan.weight_decay"),
        ("job", {"plan": {**PLAN, "prox_mu": INF}}, "$.plan.prox_mu"),
        ("job", {"plan": {**PLAN, "exit_weights": [INF]}}, "$.plan.exit_weights[0]"),
        ("update", {"phases": {"train": {"wall_s": INF}}}, "$.phases[...].wall_s"),
        ("update", {"phases": {"train": {"wall_s": 1.0, "cpu_s": INF}}}, "$.phases[...].cpu_s"),
    ],
)
def test_wrong_values_are_refused_with_their_place(tag, changes, path):
    assert f"`{path}" in refused(frame(tag, **changes))


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("memory_total_bytes", [0, 2**53], [-1, 2**53 + 1, 1.0]),
        ("memory_available_bytes", [0, 2**53], [-1, 2**53 + 1]),
        ("cores", [0.25, 4096], [0.0, -1.0, 4097.0, INF, NAN]),
        ("gflops", [0.0, 1e9], [-1.0, 2e9, INF, NAN]),
        ("link_mbit_s", [None, 0.5, 1e6], [0.0, -1.0, 2e6, INF, NAN]),
        ("cpu_scale", [None, 0.5, 1e9], [0.0, -1.0, 2e9, INF, NAN]),
        ("platform", ["", "x" * 200], ["x" * 201, "a\nb", None]),
        ("board", ["", "é" * 200], ["x" * 201, "\x1b[2J"]),
        ("machine", ["", "aarch64"], ["x" * 201, "a\0"]),
    ],
)
def test_a_profile_holds_what_a_device_can_have(field, good, bad):
    for value in good:
        profile = decode(frame("hello", profile={**PROFILE, field: value})).profile
        assert getattr(profile, field) == value
    for value in bad:
        assert f"$.profile.{field}" in refused(frame("hello", profile={**PROFILE, field: value}))


def test_a_loss_that_is_no_number_can_be_reported():
    exits = [{"exit": 1, "loss": NAN, "metric": 0.0}, {"exit": 2, "loss": INF, "metric": 0.0}]
    losses = [result.loss for result in decode(frame("update", exits=exits)).exits]
    assert math.isnan(losses[0])
    assert losses[1] == INF


# C0, DEL, C1, and the separators that some terminals and str.splitlines take for a line's end.
@pytest.mark.parametrize(
    "char", ["\0", "\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\u2029"]
)
@pytest.mark.parametrize(
    ("tag", "field"),
    [
        ("bye", "reason"),
        ("fault", "detail"),
        ("fault", "code"),
        ("ready", "reason"),
        ("hello", "session"),
        ("hello", "software"),
        ("hello", "client_id"),
        ("welcome", "run"),
    ],
)
def test_text_that_breaks_a_line_is_refused(tag, field, char):
    for text in (char, f"a{char}", f"{char}a", f"a{char}b"):
        assert f"$.{field}" in refused(frame(tag, **{field: text}))


def test_tensor_names_are_plain_text():
    for name in ["stages.0.weight", "exits.12.2.running_mean", "größe 1"]:
        job = decode(frame("job", tensors=[{**SPEC, "name": name}]))
        assert job.tensors[0].name == name
    assert "$.tensors[0].name" in refused(frame("job", tensors=[{**SPEC, "name": "a\nb"}]))
