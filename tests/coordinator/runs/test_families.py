"""Runs of several backbones, emulated, from their file to what is exported."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from coordinator.cli.main import main
from coordinator.cohorts.base import Client
from coordinator.methods.base import Family
from coordinator.runs.exporting import export_run
from coordinator.runs.families import brought_forward
from coordinator.store.reader import last_rounds
from edge_sdk.errors import ConfigError
from edge_sdk.models import build
from edge_sdk.protocol.messages import ModelSpec
from tests.support.examples import client_update

TOML = """
[small]
model = "vit"
exits = 2
options = {dim = 8, heads = 2, ffn = 8}
init = "small.safetensors"

[large]
model = "vit"
exits = 1
options = {dim = 12, heads = 2, ffn = 16, layers = 2}
"""
SMALL = {"dim": 8, "heads": 2, "ffn": 8}
FLAGS = ["emulate", "--method", "heterotune", "--clients", "4", "--examples", "80", "--epochs", "1"]
FLAGS += ["--test-examples", "40", "--batch-size", "8", "--adapt-rank", "2", "--adapt", "dema"]
FLAGS += ["--split", "iid", "--holdout", "0.2", "--share", "aligned", "--device", "cpu"]


def small_weights():
    spec = ModelSpec(
        family="vit", input_shape=(1, 8, 8), num_classes=10, exit=2, options=dict(SMALL)
    )
    torch.manual_seed(7)
    return build(spec).tensors()


@pytest.fixture
def backbones(tmp_path):
    save_file(small_weights(), tmp_path / "small.safetensors")
    path = tmp_path / "backbones.toml"
    path.write_text(TOML)
    return path


def emulated(path, folder, rounds, *more):
    where = ["--backbones", str(path), "--run-dir", str(folder), "--rounds", str(rounds)]
    return main([*FLAGS, *where, *more])


def test_a_run_of_two_backbones(backbones, tmp_path, capsys, caplog):
    """Weights of each, figures of each, models of each; a run that is cut short and goes on
    without its files gives the same bytes."""
    out = tmp_path / "out.json"
    caplog.set_level("INFO")
    assert emulated(backbones, tmp_path / "whole", 2, "--out", str(out)) == 0
    told = "43 of the model's 43 tensors begin from it"  # adapters are in no such file
    assert [record for record in caplog.records if told in record.getMessage()]
    lines = capsys.readouterr().out.splitlines()
    assert "small " in lines[0]
    assert "large " in lines[0]
    small = load_file(tmp_path / "whole" / "model-small.safetensors")
    for name, tensor in small_weights().items():
        if name.startswith("stages."):
            assert torch.equal(small[name], tensor), "a frozen backbone stays as it was given"
    figures = json.loads(out.read_text())["rounds"][-1]["figures"]
    for name in ("small", "large"):
        assert 0 <= figures[f"{name}.accuracy"] <= 1
        assert figures[f"{name}.personal_clients"] == 2
        assert f"{name}.saved_loss" in figures
    assert len(json.loads(out.read_text())["personal"]) == 4
    row = last_rounds(tmp_path / "whole", 1)[0]
    assert {name: len(exits) for name, exits in row.families.items()} == {"small": 2, "large": 1}
    assert main(["status", "--run-dir", str(tmp_path / "whole")]) == 0
    assert "small accuracy" in capsys.readouterr().out

    assert emulated(backbones, tmp_path / "cut", 1) == 0
    backbones.unlink()
    (tmp_path / "small.safetensors").unlink()
    assert emulated(backbones, tmp_path / "cut", 2, "--resume") == 0
    for name in ("model-small", "model-large", "round-000002"):
        whole, cut = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_each_backbone_can_be_exported(backbones, tmp_path):
    pytest.importorskip("onnx")
    run = tmp_path / "run"
    assert emulated(backbones, run, 1) == 0
    export_run(run, tmp_path / "small", backbone="small")
    export_run(run, tmp_path / "large", client_id="client-004")
    for name, exits in (("small", 2), ("large", 1)):
        assert len(list((tmp_path / name).glob("stage_*.onnx"))) == exits
    with pytest.raises(ConfigError, match="give --backbone: small, large, or --client"):
        export_run(run, tmp_path / "none")
    with pytest.raises(ConfigError, match="--backbone medium: .*it has small, large"):
        export_run(run, tmp_path / "none", backbone="medium")


def test_a_group_of_clients_trains_the_backbone_that_is_asked(backbones, tmp_path):
    out = tmp_path / "out.json"
    more = ["--groups", "1,3", "--variants", "2,1", "--out", str(out)]
    assert emulated(backbones, tmp_path / "run", 1, *more) == 0
    groups = json.loads(out.read_text())["groups"]
    assert [(g["clients"], g["variant"]) for g in groups.values()] == [(1, 2), (3, 1)]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("exits = 1", "exit = 1", "[large]: object contains unknown field"),
        ("exits = 1", "exits = 0", "[large]: "),
        ("[large]", "[small]", "small"),
        ("[large]", "[Large One]", "Expected"),
        ("[large]", '["Large"]', "[Large], expected a name of 1 to 32 small letters"),
        ('"vit"\nexits = 1', '"vitt"\nexits = 1', "large: "),
        ('"vit"\nexits = 1', '"llama"\nexits = 1', "large: "),
        ("small.safetensors", "none.safetensors", "small: init"),
        (TOML, "", "has no table"),
    ],
)
def test_a_wrong_file_is_one_line(backbones, tmp_path, capsys, old, new, said):
    backbones.write_text(TOML.replace(old, new))
    assert emulated(backbones, tmp_path / "run", 1) in (1, 2)
    error = capsys.readouterr().err
    assert said.lower() in error.lower(), error
    assert error.splitlines()[-1].startswith("edge-coordinator"), error
    assert not (tmp_path / "run").exists(), "before a folder is made"


def test_weights_of_another_model_are_told_with_the_backbone(backbones, tmp_path, capsys):
    other = {name: torch.cat([tensor, tensor]) for name, tensor in small_weights().items()}
    save_file(other, tmp_path / "small.safetensors")
    assert emulated(backbones, tmp_path / "run", 1) == 1
    error = capsys.readouterr().err
    assert "--backbones, small: init" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--model", "--init", "--exits"])
def test_flags_of_one_model_are_refused_beside_it(backbones, tmp_path, capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        emulated(backbones, tmp_path / "run", 1, flag, "1")
    assert f"{flag} has no effect with --backbones" in capsys.readouterr().err


def test_there_is_no_one_model_to_export_at_the_end(backbones, tmp_path, capsys):
    assert emulated(backbones, tmp_path / "run", 1, "--export", "x") == 1
    assert "leave it out; edge-coordinator export --backbone NAME" in capsys.readouterr().err


def test_other_methods_refuse_backbones(backbones, tmp_path, capsys):
    where = ["--backbones", str(backbones), "--run-dir", str(tmp_path / "run")]
    assert main(["emulate", "--method", "fedavg-l", *where]) in (1, 2)
    assert "--backbones has no place there" in capsys.readouterr().err


class TwoModels:
    """Of one weight each."""

    def families(self):
        held = [{"stages.0.w": torch.tensor([float(number)])} for number in (10, 20)]
        return dict(zip(("small", "large"), (Family(None, h, h) for h in held), strict=True))

    def begin_family_from(self, name, tensors):
        raise AssertionError("updates are brought forward, no model begins anew")


def test_a_late_update_goes_on_from_its_own_model():
    """Half of a movement of 4 counts two rounds later: 10 + 2 and 20 + 2."""
    late = {"staleness": 2, "sent": {"stages.0.w": torch.tensor([1.0])}}
    updates = [
        client_update(Client("a", 1, variant=v), {"stages.0.w": torch.tensor([5.0])}, (), **late)
        for v in (1, 2)
    ]
    found = brought_forward(updates, TwoModels(), [{"stages.0.w"}] * 2, half_life=2.0)
    assert [float(update.tensors["stages.0.w"]) for update in found] == [12.0, 22.0]
