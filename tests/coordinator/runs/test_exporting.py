"""--export: tried before the first round, and a run whose export fails at the end is finished."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from coordinator.cli.main import NOT_EXPORTED, main
from coordinator.methods.registry import make_method
from coordinator.runs.exporting import export_finished
from coordinator.store.store import Store
from edge_sdk.errors import ExportError
from edge_sdk.infer.export import export
from edge_sdk.infer.model_folder import read_model
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import ModelSpec
from tests.support.examples import config, examples
from tests.support.processes import World

MODULE = "tests.support.transformer_family"
EMULATE = [
    *("emulate", "--data", "digits", "--examples", "90", "--clients", "3", "--groups", "1,1,1"),
    *("--rounds", "1", "--epochs", "1", "--import", MODULE, "--model"),
]


@pytest.fixture
def family(own_things, monkeypatch):
    """Known in one test only."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return importlib.import_module(MODULE)


def test_transformer_layers_are_exported_and_stay_fast_elsewhere(family, tmp_path):
    spec = ModelSpec(family="encoder", input_shape=(1, 8, 8), num_classes=3, exit=2)
    made = export(spec, initial_tensors(spec, 0), tmp_path / "model", examples=examples(12))
    assert made.largest_difference < 1e-5
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_run_with_transformer_layers_ends_with_its_export(family, tmp_path, capfd):
    flags = ["--run-dir", str(tmp_path / "run"), "--export", str(tmp_path / "model")]
    assert main([*EMULATE, "encoder", *flags]) == 0
    assert read_model(tmp_path / "model").spec.family == "encoder"
    round_1, wrote = capfd.readouterr().out.splitlines()
    assert round_1.startswith("round 1: ")
    assert wrote.startswith(f"wrote {tmp_path / 'model'}: encoder")


def test_what_cannot_be_exported_begins_no_run(family, tmp_path, capfd):
    """In one line: torch prints its graph, 40 lines here, on the file descriptor."""
    flags = ["--run-dir", str(tmp_path / "run"), "--export", str(tmp_path / "model")]
    assert main([*EMULATE, "fourier", *flags]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = (line for line in err.splitlines() if "cannot be written as ONNX" in line)
    assert "model 'fourier' cannot be written as ONNX" in line
    assert "aten::fft_fft" in line
    assert line.endswith("or leave --export out; nothing was trained")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("is_temporary", "way"),
    [
        (
            False,
            "edge-coordinator export --run {0}/run --out {0}/model --import mine --import more",
        ),
        (True, "nothing was kept"),
    ],
)
def test_an_export_that_fails_at_the_end_says_how_to_do_it_again(tmp_path, is_temporary, way):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "photo.jpg").touch()
    store = Store.create(tmp_path / "run", config("owners-mean"), "emulate")
    store.is_temporary = is_temporary
    with pytest.raises(ExportError) as raised:
        method, out = make_method(store.config), tmp_path / "model"
        export_finished(store, method, None, out, imports=["mine", "more"])
    store.close()
    assert str(raised.value).startswith(f"run {store.run} is finished, but its model was not exp")
    assert "photo.jpg, which is no part of an exported model" in str(raised.value)
    assert way.format(tmp_path) in str(raised.value)


def test_a_served_run_is_finished_whatever_its_export(tmp_path, capsys):
    """The folder is taken while devices train."""
    target = tmp_path / "model"
    with World(tmp_path / "world", num_devices=1) as world:
        coordinator = world.serve("--rounds", "1", "--export", str(target))
        coordinator.wait_said("listening on")
        target.mkdir()
        (target / "photo.jpg").touch()
        device = world.device("a", "--once")
        assert coordinator.end() == NOT_EXPORTED
        assert device.end() == 0
        assert coordinator.said(f"edge-coordinator export --run {world.run_dir} --out {target}")
        assert (world.run_dir / "model.safetensors").exists()
        assert main(["status", "--run-dir", str(world.run_dir), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["health"] == "finished"
        (target / "photo.jpg").unlink()
        assert main(["export", "--run", str(world.run_dir), "--out", str(target)]) == 0
