"""What goes with an exported model of its training data, and what is compared with that."""

from __future__ import annotations

import dataclasses
import json

import msgspec
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from coordinator.cli.main import main as coordinate
from edge_sdk.cli.main import main
from edge_sdk.data.contract import TrainedOn, scaling_of
from edge_sdk.data.examples import Examples
from edge_sdk.data.loading import save_shard
from edge_sdk.errors import DataError
from edge_sdk.infer.early_exit import EarlyExit
from edge_sdk.infer.export import cut, export, read_trained_on, read_weights
from edge_sdk.infer.model_folder import MODEL, read_model
from edge_sdk.models import initial_tensors
from tests.support.data_files import fails, write_npz
from tests.support.examples import cnn, examples, one_line

NAMES = ("cat", "dog", "owl")
# 8-bit pixels of a whole range: 0 to 255 in steps of 4.05, -1 to 1 once scaled.
PIXELS = np.linspace(0, 255, 6 * 64).astype(np.uint8).reshape(6, 1, 8, 8)
Y = np.arange(6) % 3


@pytest.fixture
def folder(tmp_path):
    x = (PIXELS / 127.5 - 1).astype(np.float32)
    data = Examples(x, Y, 3, scaling=(127.5, 1.0), class_names=NAMES)
    export(cnn(), initial_tensors(cnn(), 0), tmp_path / "model", examples=data)
    return tmp_path / "model"


def infer(folder, path, capsys) -> str:
    """The one line that refuses, or "" with what was logged."""
    status = main(["infer", str(folder), "--data", str(path)])
    err = capsys.readouterr().err
    assert status == (1 if err.startswith("edge-sdk: ") else 0)
    return err


@pytest.mark.parametrize("ending", ["npz", "npy"])
def test_data_scaled_unlike_the_training_data_are_refused(folder, tmp_path, capsys, ending):
    path = tmp_path / f"data.{ending}"
    for divisor, shown in ((255, "0 to 1"), (1, "0 to 255")):
        x = (PIXELS / divisor).astype(np.float32)
        np.savez(path, x=x, y=Y) if ending == "npz" else np.save(path, x)
        said = one_line(infer(folder, path, capsys), "edge-sdk")
        assert "the model's training data are integers / 127.5 - 1" in said
        assert f"floats as given, {shown}" in said
    np.savez(path, x=PIXELS, y=Y) if ending == "npz" else np.save(path, PIXELS)
    assert main(["infer", str(folder), "--data", str(path)]) == 0


def test_calibration_is_held_to_the_same(folder, tmp_path, capsys):
    path = write_npz(tmp_path / "data.npz", x=(PIXELS / 255).astype(np.float32), y=Y)
    assert main(["calibrate", str(folder), "--data", path, "--accuracy-loss", "0.1"]) == 1
    assert "floats as given, 0 to 1" in one_line(capsys.readouterr().err, "edge-sdk")


def test_a_programs_own_arrays_are_looked_at(folder, caplog):
    engine = EarlyExit.load(folder)
    scaled = (PIXELS / 127.5 - 1).astype(np.float32)
    for right in (PIXELS, scaled, scaled[:1], np.float32(-1) * np.abs(scaled), scaled * 1.2):
        engine.predict(right)
    assert not caplog.records
    with pytest.raises(DataError, match=r"floats, 0 to 255; those that trained the model were int"):
        engine.predict(PIXELS.astype(np.float32))
    with pytest.raises(DataError, match=r"floats, 0 to 255"):
        engine.all_exits(PIXELS.astype(np.float32))
    for _ in range(2):
        engine.predict((PIXELS / 255).astype(np.float32))
    (told,) = caplog.records  # once
    assert "the inputs are floats, 0 to 1; those that trained the model were" in told.message


def test_floats_far_beyond_those_of_the_training_are_refused(tmp_path):
    export(cnn(), initial_tensors(cnn(), 0), tmp_path / "m", examples=examples(6))  # about -3 to 3
    engine = EarlyExit.load(tmp_path / "m")
    engine.predict(examples(6).x * 20)
    with pytest.raises(DataError, match="floats as given"):
        engine.predict(examples(6).x * 1000)


def test_class_names_and_range_go_with_the_model(folder, tmp_path):
    made = json.loads((folder / MODEL).read_text())
    assert made["class_names"] == [*NAMES]
    assert made["input_range"] == [-1.0, 1.0]
    part = cut(folder, 1, tmp_path / "part")
    assert (part.class_names, part.inputs) == (NAMES, scaling_of(-1, 1, (127.5, 1.0)))


def test_other_names_than_the_models_are_refused(folder, tmp_path, capsys):
    path = write_npz(tmp_path / "a.npz", x=PIXELS, y=Y, class_names=NAMES[::-1])
    said = one_line(infer(folder, path, capsys), "edge-sdk")
    assert "class_names owl, dog, cat, expected those of the model, cat, dog, owl" in said


def test_data_to_check_an_export_on_are_compared(tmp_path):
    known = TrainedOn(scaling=scaling_of(-1, 1, (127.5, 1.0)))
    unlike = dataclasses.replace(examples(6), x=np.abs(examples(6).x))
    tensors = initial_tensors(cnn(), 0)
    fails(
        lambda: export(cnn(), tensors, tmp_path / "m", examples=unlike, trained_on=known),
        "the inputs of the run are integers / 127.5 - 1, those of the data to check it on",
    )


def test_a_run_gives_its_scaling_and_names_to_its_models(tmp_path):
    data = examples(60)
    named = dataclasses.replace(data, class_names=NAMES)
    save_shard(tmp_path / "data.npz", named)
    run = tmp_path / "run"
    flags = ["--data", str(tmp_path / "data.npz"), "--clients", "3", "--groups", "1,1,1"]
    option = ["--option", "channels=4,5,6", "--rounds", "1", "--epochs", "1", "--split", "iid"]
    export_to = ["--run-dir", str(run), "--export", str(tmp_path / "whole")]
    assert coordinate(["emulate", *flags, *option, *export_to]) == 0
    weights = run / "model.safetensors"
    trained_on = read_trained_on(weights)
    assert trained_on is not None
    assert trained_on.class_names == NAMES
    assert main(["export", str(weights), "--out", str(tmp_path / "own")]) == 0  # random inputs
    assert coordinate(["export", "--run", str(run), "--out", str(tmp_path / "late")]) == 0
    for name in ("whole", "own", "late"):
        made = read_model(tmp_path / name)
        assert (made.class_names, made.inputs) == (NAMES, trained_on.scaling)
    old = {"spec": msgspec.json.encode(read_weights(weights)[0]).decode()}
    save_file(load_file(weights), tmp_path / "old.safetensors", old)
    assert read_weights(tmp_path / "old.safetensors")[0] == read_weights(weights)[0]
    assert read_trained_on(tmp_path / "old.safetensors") is None


def test_a_model_of_an_earlier_version_is_read(folder, tmp_path, capsys):
    about = json.loads((folder / MODEL).read_text())
    del about["class_names"], about["input_range"]
    (folder / MODEL).write_text(json.dumps(about))
    assert read_model(folder).inputs == scaling_of(0, 0, (127.5, 1.0))
    path = write_npz(tmp_path / "a.npz", x=(PIXELS / 255).astype(np.float32), y=Y)
    infer(folder, path, capsys)  # its range is not known, so nothing is compared
    path = write_npz(tmp_path / "b.npz", x=examples(6).x.round() / 8 - 1, y=Y, scaling=[8.0, 1.0])
    assert "integers / 8 - 1" in one_line(infer(folder, path, capsys), "edge-sdk")
