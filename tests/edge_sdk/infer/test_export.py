"""Folding by hand, and what an export refuses; every family is in contract/test_export.py."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coordinator.cli.main import main as coordinate
from edge_sdk.cli.main import main
from edge_sdk.data.loading import load_dataset, save_shard
from edge_sdk.errors import ConfigError, DataError, ShapeError, StoreError
from edge_sdk.infer import early_exit
from edge_sdk.infer import export as module
from edge_sdk.infer.early_exit import EarlyExit
from edge_sdk.infer.export import cut, export
from edge_sdk.infer.model_folder import MODEL, read_model
from edge_sdk.infer.onnx_layers import bin_weights, fold_batch_norms_
from edge_sdk.models import FAMILIES, Family, StagedModel, initial_tensors
from edge_sdk.protocol.messages import ModelSpec
from tests.support.examples import cnn, examples, two_exits
from tests.support.processes import World


def test_batch_norm_folds_into_the_layer_before_it():
    """w = 2, b = 1; mean 3, variance 4, gamma 5, beta 7: w' = 2 * 5 / 2, b' = -2 * 5 / 2 + 7."""
    norm = nn.BatchNorm1d(1, eps=0.0).eval()
    chain = nn.Sequential(nn.Linear(1, 1), norm)
    with torch.no_grad():
        for tensor, value in (
            (chain[0].weight, 2),
            (chain[0].bias, 1),
            (norm.running_mean, 3),
            (norm.running_var, 4),
            (norm.weight, 5),
            (norm.bias, 7),
        ):
            tensor.fill_(value)
    fold_batch_norms_(chain)
    assert isinstance(chain[1], nn.Identity)
    assert chain[0].weight.item() == pytest.approx(5)
    assert chain[0].bias.item() == pytest.approx(2)


def test_batch_norm_that_is_not_behind_a_layer_stays():
    """Behind a pool, as the first layer, or normalising by the batch: nothing to fold into."""
    chain = nn.Sequential(
        nn.BatchNorm2d(1),
        nn.Conv2d(1, 2, 3),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 2, 1),
        nn.BatchNorm2d(2, track_running_stats=False),
    ).eval()
    kinds = [type(layer) for layer in chain]
    fold_batch_norms_(chain)
    assert [type(layer) for layer in chain] == kinds


@pytest.mark.parametrize(("side", "count"), [(7, 2), (3, 2), (1, 2), (5, 3), (6, 3)])
def test_bins_are_those_of_the_adaptive_pool(side, count):
    x = torch.arange(float(side)).reshape(1, 1, side) ** 2
    wanted = nn.functional.adaptive_avg_pool1d(x, count)
    assert torch.allclose(x @ bin_weights(side, count), wanted)


class Odd(nn.Module):
    """A stage that only looks as if it could be exported."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, x):
        self.calls += 1
        if self.kind == "len":
            return x.reshape(len(x), -1)
        return x * self.calls  # another function every time


def family(monkeypatch, stage):
    """The spec of a family of one exit with this stage on inputs (1, 4, 4)."""

    def build_odd(spec):
        head = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        return StagedModel([stage], [head], main_weights=[])

    monkeypatch.setattr(FAMILIES, "_entries", FAMILIES._entries | {"odd": Family(build_odd)})
    return ModelSpec(family="odd", input_shape=(1, 4, 4), num_classes=2, exit=1)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("len", "does the model take len()"),
        ("calls", "differ from torch by"),
    ],
)
def test_a_model_that_onnx_computes_otherwise_is_refused(tmp_path, monkeypatch, kind, said):
    spec = family(monkeypatch, Odd(kind))
    with pytest.raises(StoreError) as refused:
        export(spec, initial_tensors(spec, 0), tmp_path / "model")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_onnx_lacks_is_one_line(tmp_path, monkeypatch):
    pool = nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.ZeroPad2d((0, 1, 0, 1)))  # 3 bins of 4
    spec = family(monkeypatch, pool)
    with pytest.raises(ConfigError) as refused:
        export(spec, initial_tensors(spec, 0), tmp_path / "model")
    assert "model 'odd' cannot be written as ONNX" in str(refused.value)
    assert "\n" not in str(refused.value)


class Scaled(nn.Module):
    """A learnable scalar."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x):
        return x * self.by


def scaled_by(monkeypatch, by: float) -> ModelSpec:
    """The spec of a family that scales its inputs twice, each time before a product."""

    def build(spec):
        stages = [nn.Sequential(nn.Flatten(), Scaled(by)), Scaled(by)]
        exits = [nn.Linear(64, spec.num_classes, bias=False) for _ in stages]
        return StagedModel(stages, exits)

    monkeypatch.setattr(FAMILIES, "_entries", FAMILIES._entries | {"scaled": Family(build)})
    return ModelSpec(family="scaled", input_shape=(1, 8, 8), num_classes=3, exit=2)


def test_what_only_a_trained_model_breaks_is_found_before_training(monkeypatch):
    """Scaling by exactly 1 is optimised away, and then there is nothing to fuse."""
    spec = scaled_by(monkeypatch, 1.0)
    module.check_exportable(spec, initial_tensors(spec, 0), None)
    monkeypatch.setattr(early_exit, "BROKEN", [])
    with pytest.raises(StoreError, match=r"whole.onnx cannot be loaded: .* is not a graph input"):
        module.check_exportable(spec, initial_tensors(spec, 0), None)


def test_a_learnable_scalar_before_a_product_is_exported(tmp_path, monkeypatch):
    """onnxruntime would fuse the two into a graph that it then cannot load."""
    spec = scaled_by(monkeypatch, 1.5)
    tensors = initial_tensors(spec, 0)
    assert export(spec, tensors, tmp_path / "model").largest_difference < 1e-5
    x = examples(5).x
    _, second = EarlyExit.load(tmp_path / "model").all_exits(x)
    wanted = 2.25 * x.reshape(5, 64) @ tensors["exits.1.weight"].numpy().T
    assert np.allclose(second, wanted, atol=1e-4)


def test_batch_norms_that_stay_are_counted_and_right(tmp_path, monkeypatch):
    norm = nn.BatchNorm2d(1)
    norm.running_var.fill_(4.0)
    spec = family(monkeypatch, nn.Sequential(nn.MaxPool2d(1), norm))
    tensors = {name: t for name, t in initial_tensors(spec, 0).items() if "num_batches" not in name}
    made = export(spec, tensors, tmp_path / "model")
    assert made.batch_norms == 1
    assert made.largest_difference < 1e-5


def test_weights_and_data_that_do_not_fit_are_refused(tmp_path):
    spec, tensors = two_exits()
    with pytest.raises(ShapeError, match=r"exits\.0\.weight holds NaN"):
        export(spec, tensors | {"exits.0.weight": torch.full((2, 2), torch.nan)}, tmp_path / "m")
    with pytest.raises(DataError, match=r"the model takes \(2,\)"):
        export(spec, tensors, tmp_path / "m", examples=examples(5))
    with pytest.raises(ShapeError, match="does not belong"):
        export(spec, tensors | {"stages.9.weight": torch.zeros(1)}, tmp_path / "m")
    with pytest.raises(DataError, match="NaN or infinite logits"):
        export(spec, tensors | {"exits.0.weight": torch.full((2, 2), 3e38)}, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_an_export_takes_the_place_of_an_export_and_of_nothing_else(tmp_path):
    spec, tensors = two_exits()
    folder = tmp_path / "deep" / "model"
    export(spec, tensors, folder)
    first = (folder / MODEL).read_bytes()
    (folder / "calibration.json").write_text("of the first")
    export(spec, tensors | {"exits.1.bias": torch.ones(2)}, folder)
    assert (folder / MODEL).read_bytes() != first
    assert not (folder / "calibration.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (folder / "thesis.tex").write_text("mine")
    second = (folder / MODEL).read_bytes()
    with pytest.raises(StoreError, match=r"holds thesis\.tex, which is no part"):
        export(spec, tensors, folder)
    assert (folder / MODEL).read_bytes() == second
    with pytest.raises(StoreError, match="is no folder"):
        export(spec, tensors, folder / "thesis.tex")


def test_an_error_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    spec, tensors = two_exits()
    export(spec, tensors, tmp_path / "model")
    before = (tmp_path / "model" / MODEL).read_bytes()

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_struct", full)
    with pytest.raises(StoreError, match="No space left"):
        export(spec, tensors | {"exits.1.bias": torch.ones(2)}, tmp_path / "model")
    assert (tmp_path / "model" / MODEL).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"needs onnx, .* pip install .*whl\[export\]"):
        export(*two_exits(), tmp_path / "model")
    flags = ["--data", "digits", "--clients", "2", "--groups", "2", "--export", "m"]
    assert coordinate(["emulate", *flags]) == 1, "told before the rounds"


def test_a_cut_has_the_first_exits(tmp_path):
    export(cnn(), initial_tensors(cnn(), 0), tmp_path / "model", examples=examples(5))
    x = examples(7).x
    for exit in (1, 2, 3):
        made = cut(tmp_path / "model", exit, tmp_path / "cut")
        assert made.spec.exit == exit
        assert made == read_model(tmp_path / "cut")
        names = {path.name for path in (tmp_path / "cut").glob("stage_*")}
        assert names == {f"stage_{number}.onnx" for number in range(1, exit + 1)}
        before, after = (EarlyExit.load(tmp_path / name).all_exits(x) for name in ("model", "cut"))
        assert np.allclose(before[:exit], after, atol=1e-6)
    with pytest.raises(ConfigError, match="exit 4 of a model of 3"):
        cut(tmp_path / "model", 4, tmp_path / "other")


# -- the command lines -------------------------------------------------------------------------


def test_from_a_run_to_a_device(tmp_path, capsys):
    """Emulated rounds, their exports, a client's part, and the same model on the device."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = ["--clients", "4", "--groups", "2,1,1", "--rounds", "1", "--examples", "120"]
    common = ["--data", "digits", "--batch-size", "8", "--epochs", "1", "--seed", "3"]
    option = ["--option", "channels=4,5,6", "--test-examples", "50", "--method", "owners-mean"]
    assert (
        coordinate(
            ["emulate", *flags, *common, *option, "--run-dir", str(run), "--export", str(whole)]
        )
        == 0
    )
    assert "wrote" in capsys.readouterr().out.splitlines()[-1]
    made = read_model(whole)
    assert (made.spec.exit, made.scaling, made.checked_on) == (3, (8.0, 1.0), "50 examples")

    parts = {"all": [], "first": ["--exit", "2"], "weak": ["--client", "client-001"]}
    for name, part in parts.items():
        assert coordinate(["export", "--run", str(run), "--out", str(tmp_path / name), *part]) == 0
    assert main(["export", str(run / "model.safetensors"), "--out", str(tmp_path / "own")]) == 0
    assert main(["export", str(whole), "--exit", "2", "--out", str(tmp_path / "cut")]) == 0
    x = load_dataset("digits", 0).test.x[:20]
    wanted = EarlyExit.load(whole).all_exits(x)
    for name, exits in {"all": 3, "first": 2, "weak": 1, "own": 3, "cut": 2}.items():
        assert np.allclose(EarlyExit.load(tmp_path / name).all_exits(x), wanted[:exits], atol=1e-5)

    capsys.readouterr()
    out = ["--out", str(tmp_path / "other")]
    for command, said in {
        ("--run", str(run), "--client", "pi-9"): "'pi-9' took part in no round",
        ("--run", str(run), "--exit", "4"): "exit 4 of a model of 3",
        ("--run", str(tmp_path / "nowhere")): "holds no run",
        ("--run", str(run), "--data", "nowhere"): "nowhere",
    }.items():
        assert coordinate(["export", *command, *out]) == 1
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_sources_that_are_no_model_are_one_line(tmp_path, capsys):
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    save_file({"x": torch.zeros(1)}, tmp_path / "checkpoint.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "spec.safetensors", {"spec": '{"family": 1}'})
    save_shard(tmp_path / "held.npz", examples(5))
    (tmp_path / "empty").mkdir()
    export(*two_exits(), tmp_path / "model")
    for source, said in {
        "garbage.safetensors": "expected a model.safetensors",
        "checkpoint.safetensors": "does not say what model it is of",
        "spec.safetensors": "made by another version",
        "nowhere.safetensors": "nowhere.safetensors",
        "empty": "give --exit",
        "model": "give --exit",
    }.items():
        status = 2 if said == "give --exit" else 1
        assert main(["export", str(tmp_path / source), "--out", str(tmp_path / "out")]) == status
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    flags = ["--exit", "1", "--out", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "empty"), *flags]) == 1
    assert "no model.json there" in capsys.readouterr().err


@pytest.mark.slow
def test_serve_exports_when_its_run_ends(tmp_path):
    """Up to the one exit that its device trained: for more it has no time. And then its part."""
    with World(tmp_path, num_devices=1) as world:
        flags = ["--rounds", "1", "--deadline", "0.02", "--export", str(tmp_path / "model")]
        coordinator = world.serve(*flags)
        world.device("a", "--once")
        assert coordinator.end() == 0, coordinator.text()
        assert coordinator.said("wrote ")
        assert read_model(tmp_path / "model").checked_on == "40 examples"
        flags = ["--run", str(world.run_dir), "--client", "a", "--out", str(tmp_path / "part")]
        assert coordinate(["export", *flags]) == 0
        assert coordinator.said("no device trained exit 2, 3 of 3")
        assert read_model(tmp_path / "model").spec.exit == 1
        assert read_model(tmp_path / "part").spec.exit == 1
