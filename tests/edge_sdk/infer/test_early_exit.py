"""Early exit by numbers worked out by hand, and everything that inference refuses.

The model is helpers.two_exits. softmax at exit 1 of (1, 0) is (3/4, 1/4), of (2, 0) (9/10, 1/10),
of (0, 1) (1/2, 1/2); at exit 2 of (0, 1) it is (1/5, 4/5), of (1, 0) as well."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from edge_sdk.cli.main import main
from edge_sdk.data.examples import Examples
from edge_sdk.data.loading import save_shard
from edge_sdk.errors import ConfigError, DataError, ShapeError, StoreError
from edge_sdk.helpers.files import sha256_of, write_struct
from edge_sdk.infer.early_exit import NEVER, EarlyExit
from edge_sdk.infer.export import export
from edge_sdk.infer.model_folder import ExitThresholds
from edge_sdk.models import build, initial_tensors
from edge_sdk.tasks.base import of_softmax
from tests.support.examples import cnn, examples, one_line, two_exits
from tests.support.processes import ROOT

X = np.array([[1, 0], [2, 0], [0, 1]], np.float32)


@pytest.fixture
def folder(tmp_path):
    spec, tensors = two_exits()
    export(spec, tensors, tmp_path / "model")
    return tmp_path / "model"


class Counted:
    """A session that notes how many examples each run had."""

    def __init__(self, session):
        self.session = session
        self.sizes = []

    def run(self, names, inputs):
        self.sizes.append(len(inputs["input"]))
        return self.session.run(names, inputs)


def counted(engine):
    sessions = tuple(map(Counted, engine.sessions))
    return dataclasses.replace(engine, sessions=sessions), sessions


def test_an_example_stops_at_the_first_confident_exit(folder):
    engine, (first, second) = counted(EarlyExit.load(folder, threshold=0.7))
    found = engine.predict(X)
    assert found.label.tolist() == [0, 0, 1]
    assert found.exit.tolist() == [1, 1, 2]
    assert found.confidence.tolist() == pytest.approx([0.75, 0.9, 0.8])
    assert (first.sizes, second.sizes) == ([3], [1]), "only the one left goes on"


def test_all_exits_are_asked_a_batch_at_a_time(folder):
    engine, (first, second) = counted(EarlyExit.load(folder))
    x = np.tile(X, (50, 1))
    wanted, found = engine.all_exits(X), list(engine.batches(x))
    assert [part.shape for part in found] == [(2, 100, 2), (2, 50, 2)]
    np.testing.assert_allclose(np.concatenate(found, 1), np.tile(wanted, (1, 50, 1)))
    assert first.sizes == second.sizes == [3, 100, 50]


def test_stopping_early_runs_no_later_stage(folder):
    engine, (first, second) = counted(EarlyExit.load(folder, threshold=0.7))
    assert engine.predict(X[:2]).exit.tolist() == [1, 1]
    assert (first.sizes, second.sizes) == ([2], [])


def test_threshold_0_stops_all_at_exit_1_and_above_1_none(folder):
    assert EarlyExit.load(folder, threshold=0).predict(X).exit.tolist() == [1, 1, 1]
    assert EarlyExit.load(folder, threshold=0, measure="entropy").predict(X).exit.max() == 1
    for threshold in (1.01, NEVER, math.inf):
        assert EarlyExit.load(folder, threshold=threshold).predict(X).exit.tolist() == [2, 2, 2]
    assert EarlyExit.load(folder).predict(X).exit.tolist() == [2, 2, 2], "not calibrated"


def test_never_stopping_equals_the_deepest_exit_of_torch(tmp_path):
    spec, data = cnn(), examples(20)
    model = build(spec).eval()
    model.load(initial_tensors(spec, 0))
    export(spec, model.tensors(), tmp_path / "model", examples=data)
    found = EarlyExit.load(tmp_path / "model", threshold=NEVER).predict(data.x)
    with torch.no_grad():
        probabilities = model(torch.from_numpy(data.x))[-1].softmax(1)
    assert found.label.tolist() == probabilities.argmax(1).tolist()
    assert found.confidence == pytest.approx(probabilities.amax(1).numpy(), abs=1e-5)


def test_entropy_is_one_minus_its_share_of_the_largest():
    logits = np.array([[math.log(3), 0], [0, 0], [1e4, 0]], np.float32)
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert of_softmax(logits, "entropy") == pytest.approx([1 - quarter, 0, 1], abs=1e-6)
    assert of_softmax(logits, "softmax") == pytest.approx([0.75, 0.5, 1])


def test_each_exit_has_its_own_threshold(tmp_path):
    spec = cnn()
    export(spec, initial_tensors(spec, 0), tmp_path / "model")
    engine = EarlyExit.load(tmp_path / "model", threshold=(NEVER, 0))
    assert set(engine.predict(examples(5).x).exit) == {2}
    with pytest.raises(ConfigError, match="1 thresholds for 3 exits, expected 2"):
        EarlyExit.load(tmp_path / "model", threshold=(0.5,))
    with pytest.raises(ConfigError, match="at least 0"):
        EarlyExit.load(tmp_path / "model", threshold=math.nan)


def test_integers_are_scaled_as_the_training_data_were(tmp_path):
    spec, tensors = two_exits()
    known = Examples(X, np.zeros(3, np.int64), 2, scaling=(2.0, 1.0))
    export(spec, tensors, tmp_path / "model", examples=known)
    engine = EarlyExit.load(tmp_path / "model", threshold=0)
    raw = np.array([[4, 2], [6, 2]], np.uint8)  # / 2 - 1 is (1, 0), (2, 0)
    assert engine.predict(raw).confidence.tolist() == pytest.approx([0.75, 0.9])


def test_no_examples_give_no_predictions(folder):
    assert EarlyExit.load(folder, threshold=0.7).predict(X[:0]).label.shape == (0,)


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (X[0], ShapeError, "shape (2,), expected (n, 2) of float32; a single one is x[None]"),
        (X[:, :1], ShapeError, "shape (3, 1)"),
        (X[None], ShapeError, "shape (1, 3, 2)"),
        (X.astype(np.float64), ShapeError, "float64"),
        (X.astype(np.uint8), ShapeError, "uint8"),
        ([[1.0, 0.0]], ShapeError, "list"),
        (np.array([[1, 0], [np.nan, 0]], np.float32), DataError, "1 of 2 examples, first at 1"),
        (np.array([[np.inf, 0]], np.float32), DataError, "NaN or infinite"),
        (np.array([[3e38, 3e38]], np.float32), DataError, "NaN or infinite logits"),
    ],
    ids=str,
)
def test_wrong_inputs_are_refused(folder, x, error, said):
    with pytest.raises(error) as refused:
        EarlyExit.load(folder).predict(x)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def edited(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_hash_of(folder, name, content):
    """A folder that is consistent in itself, with another file than was exported."""
    (folder / name).write_bytes(content)
    stages = json.loads((folder / "model.json").read_text())["stages"]
    for stage in stages:
        if stage["name"] == name:
            stage["sha256"] = sha256_of(content)
    edited(folder, stages=stages)


def spoil_cut_off(folder):
    path = folder / "stage_2.onnx"
    path.write_bytes(path.read_bytes()[:-10])


def spoil_swapped(folder):
    with_hash_of(folder, "stage_1.onnx", (folder / "stage_2.onnx").read_bytes())


SPOILED = {
    "no model.json": (lambda f: (f / "model.json").unlink(), "no model.json there"),
    "a stage lacks": (lambda f: (f / "stage_2.onnx").unlink(), "stage_2.onnx cannot be read"),
    "cut off": (spoil_cut_off, "changed or cut off; copy the folder again"),
    "garbage": (lambda f: with_hash_of(f, "stage_1.onnx", b"garbage"), "cannot be loaded"),
    "truncated ONNX": (
        lambda f: with_hash_of(f, "stage_1.onnx", (f / "stage_1.onnx").read_bytes()[:-10]),
        "cannot be loaded",
    ),
    "another stage": (spoil_swapped, "which is not stage 1"),
    "another version": (lambda f: edited(f, format=2), "has format 2, this edge-sdk reads 1"),
    "no JSON": (lambda f: (f / "model.json").write_bytes(b"\xff{"), "model.json refused"),
    "no object": (lambda f: (f / "model.json").write_text("[]"), "model.json refused"),
    "unknown key": (lambda f: edited(f, extra=1), "unknown field `extra`"),
    "stages lack": (lambda f: edited(f, stages=[]), "0 stages for 2 exits"),
    "a path": (
        lambda f: edited(f, stages=[{"name": "../x.onnx", "sha256": "0" * 64}] * 2),
        "stages[0].name",
    ),
    "garbled calibration": (lambda f: (f / "calibration.json").write_text("{"), "calibrate again"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_folder_that_is_not_as_exported_is_one_line(folder, kind, capsys):
    spoil, said = SPOILED[kind]
    spoil(folder)
    with pytest.raises(StoreError) as refused:
        EarlyExit.load(folder)
    assert said in str(refused.value)
    np.save(folder.parent / "x.npy", X)
    assert main(["infer", str(folder), "--data", str(folder.parent / "x.npy")]) == 1
    assert capsys.readouterr().err == f"edge-sdk: {refused.value}\n"


def test_calibration_counts_for_its_own_model_only(folder):
    fields = {
        "measure": "entropy",
        "thresholds": (0.1,),
        "wanted": "accuracy 1",
        "num_examples": 3,
        "metric": 1.0,
        "deepest_metric": 1.0,
        "latency_s": 0.1,
        "exit_shares": (1.0, 0.0),
        "threads": 1,
    }
    own = sha256_of((folder / "model.json").read_bytes())
    write_struct(folder / "calibration.json", ExitThresholds(model_sha256=own, **fields))
    engine = EarlyExit.load(folder)
    assert (engine.thresholds, engine.measure) == ((0.1,), "entropy")
    assert EarlyExit.load(folder, threshold=0.5).measure == "softmax"
    with pytest.raises(ConfigError, match="calibrated for entropy, not for softmax"):
        EarlyExit.load(folder, measure="softmax")
    write_struct(folder / "calibration.json", ExitThresholds(model_sha256="0" * 64, **fields))
    with pytest.raises(StoreError, match="belongs to another model"):
        EarlyExit.load(folder)


def test_without_onnxruntime_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r'pip install "./edge_sdk-.*whl\[infer\]"'):
        EarlyExit.load(folder)


# -- the command line --------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path):
    """A folder and the .npz of 12 examples (1, 8, 8) for its model."""
    data, spec = examples(12), cnn()
    export(spec, initial_tensors(spec, 0), tmp_path / "model", examples=data)
    save_shard(tmp_path / "held.npz", data)
    return tmp_path / "model", tmp_path / "held.npz", data


def test_infer_prints_accuracy_and_where_examples_stop(labelled, tmp_path, capsys):
    folder, path, data = labelled
    flags = ["infer", str(folder), "--data", str(path), "--skip", "2", "--limit", "9"]
    assert main([*flags, "--threshold", "0", "--out", str(tmp_path / "found.csv")]) == 0
    said = capsys.readouterr().out
    assert "exit 1 100.0 %, exit 2 0.0 %, exit 3 0.0 %" in said
    lines = (tmp_path / "found.csv").read_text().splitlines()
    labels = EarlyExit.load(folder, threshold=0).predict(data.x[2:11]).label.tolist()
    assert lines[0] == "index,label,exit,confidence"
    assert [int(line.split(",")[0]) for line in lines[1:]] == [*range(2, 11)], "as in the data"
    assert [int(line.split(",")[1]) for line in lines[1:]] == labels
    share = (np.array(labels) == data.y[2:11]).mean()
    assert f"accuracy {100 * share:.2f} %" in said
    assert main([*flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exit_shares"] == [0, 0, 1]
    assert result["examples"] == len(result["predictions"]) == 9
    last = result["predictions"][-1]
    assert (last["index"], last["exit"]) == (10, 3)
    assert 0 < last["confidence"] <= 1
    assert 0 < result["latency_median_s"] <= result["latency_max_s"]


def test_inputs_without_labels_have_no_accuracy(folder, tmp_path, capsys):
    """.npy and .npz follow one rule: float64 is taken, a single example wants its own axis."""
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "x.npz", x=X)
    np.save(tmp_path / "double.npy", X.astype(np.float64))
    np.savez(tmp_path / "double.npz", x=X.astype(np.float64))
    found = []
    for name in ("x.npy", "x.npz", "double.npy", "double.npz"):
        assert main(["infer", str(folder), "--data", str(tmp_path / name), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["accuracy"] is None
        found.append(result["predictions"])
    assert all(predictions == found[0] for predictions in found)
    np.save(tmp_path / "one.npy", X[0])
    np.savez(tmp_path / "one.npz", x=X[0])
    np.save(tmp_path / "whole.npy", X.astype(np.int64))
    np.savez(tmp_path / "whole.npz", x=X.astype(np.int64))
    np.savez(tmp_path / "other.npz", inputs=X)
    for name, said in [
        ("one.npy", "one example, expected (n, 2); give x[None]"),
        ("one.npz", "one example, expected (n, 2); give x[None]"),
        ("whole.npy", "x of dtype int64, expected uint8 or float"),
        ("whole.npz", "x of dtype int64, expected uint8 or float"),
        ("other.npz", "arrays ['inputs'], expected arrays x; save them under"),
    ]:
        assert main(["infer", str(folder), "--data", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err
    flags = ["--data", str(tmp_path / "x.npy")]
    assert main(["calibrate", str(folder), *flags, "--accuracy", "0.5"]) == 1
    assert "has no labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "nowhere.npy"], "nowhere.npy"),
        (["--data", "DATA", "--skip", "12"], "no examples are left"),
        (["--data", "digits"], "floats as given, -4.11 to 3.38, those of digits integers / 8 - 1"),
    ],
)
def test_bad_flags_are_one_clear_line(labelled, capsys, flags, said):
    folder, path, _ = labelled
    flags = [str(path) if flag == "DATA" else flag for flag in flags]
    assert main(["infer", str(folder), *flags]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("edge-sdk: ")
    assert err.count("\n") == 1


def test_data_scaled_otherwise_than_the_training_data_is_refused(tmp_path, capsys):
    spec, data = cnn(), examples(6)
    known = dataclasses.replace(data, scaling=(8.0, 1.0))
    export(spec, initial_tensors(spec, 0), tmp_path / "model", examples=known)
    x = np.zeros((6, 1, 8, 8), np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=data.y, scaling=(16.0, 1.0))
    assert main(["infer", str(tmp_path / "model"), "--data", str(tmp_path / "a.npz")]) == 1
    said = "the model's training data are integers / 8 - 1, those of "
    assert said in (err := capsys.readouterr().err)
    assert "a.npz integers / 16 - 1" in err


def test_pickled_inputs_are_refused(folder, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert main(["infer", str(folder), "--data", str(tmp_path / "x.npy")]) == 1
    assert "got Python objects" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"some text", b"", b"PK\x03\x04"])
def test_inputs_that_are_no_npy_file(folder, tmp_path, capsys, content):
    (tmp_path / "x.npy").write_bytes(content)
    assert main(["infer", str(folder), "--data", str(tmp_path / "x.npy")]) == 1
    said = one_line(capsys.readouterr().err, "edge-sdk")
    assert f"first bytes {content[:6]!r}, expected an .npy file" in said
    assert "pickle" not in said


def test_inference_never_loads_torch(labelled):
    """Nor the folder that it was made in: the exported one can be carried anywhere."""
    folder, path, _ = labelled
    moved = folder.with_name("carried")
    shutil.copytree(folder, moved)
    code = (
        "import sys; from edge_sdk.cli.main import main; "
        f"main(['calibrate', {str(moved)!r}, '--data', {str(path)!r}, '--accuracy', '0']); "
        f"main(['infer', {str(moved)!r}, '--data', {str(path)!r}]); "
        "print('torch' in sys.modules, 'onnxruntime' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ended.stdout.splitlines()[-1] == "False True"


@pytest.mark.parametrize(
    ("asked", "is_reported"), [({}, False), ({"ORT_DISABLE_TELEMETRY": "0"}, True)]
)
def test_onnxruntime_reports_nothing_unless_asked_to(tmp_path, asked, is_reported):
    """What it would send it keeps under the user's cache first."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")}
    code = "from edge_sdk.infer.early_exit import onnx_runtime; onnx_runtime()"
    subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HOME": str(tmp_path)} | asked,
        cwd=ROOT,
        check=True,
    )
    if is_reported and not any(tmp_path.rglob("*")):
        pytest.skip("this build of onnxruntime reports nothing anyway")
    assert bool(list(tmp_path.rglob("*.onnxruntime*"))) == is_reported
