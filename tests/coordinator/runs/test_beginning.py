"""`--init FILE`: what fits by name and shape is taken, what does not is told."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from coordinator.cli.main import main
from coordinator.methods.registry import METHODS, make_config, make_method
from coordinator.runs.beginning import load_state, read_init
from coordinator.store.store import Store
from edge_sdk.errors import ConfigError
from tests.contract.methods import unless_except
from tests.support.examples import OWN, cnn, config

EMULATE = ["emulate", "--data", "digits", "--examples", "60", "--clients", "3", "--groups", "1,1,1"]
RUN = [*EMULATE, "--rounds", "1", "--epochs", "1", "--option", "channels=4,4,4"]


def model():
    return {"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(1), "n": torch.tensor(0)}


def test_what_fits_is_taken_and_the_rest_is_told(tmp_path):
    path = tmp_path / "x.safetensors"
    given = {"a": [1.0, 2.0], "b": [[1.0]], "z": [5.0], "n": 7}
    save_file({k: torch.tensor(v).double() for k, v in given.items()}, path)
    found, told = read_init(path, model())
    assert list(found) == ["a", "n"]
    assert found["a"].dtype == torch.float32
    assert found["a"].tolist() == [1.0, 2.0]
    assert found["n"].dtype == torch.int64
    assert "2 of the model's 4 tensors begin from it" in told
    assert "1 of another shape: b (1, 1) instead of (2, 3)" in told
    assert "1 not in the file, so random: c" in told
    assert "1 not in the model, so left out: z" in told


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"z": torch.zeros(2)}, "0 of the model's 4 tensors.*names and shapes"),
        ({"a": torch.tensor([1.0, float("inf")])}, "a holds NaN or infinite"),
        (None, "cannot be read"),
        (b"no safetensors at all", "cannot be read"),
    ],
)
def test_what_cannot_be_begun_from_is_one_line(tmp_path, content, said):
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    with pytest.raises(ConfigError, match=f"--init .*{said}") as error:
        read_init(path, model())
    assert "\n" not in str(error.value)


STAGED = {
    "stages.0.w": torch.zeros(2, 2),
    "stages.1.w": torch.zeros(3),
    "exits.0.w": torch.zeros(5),
    "exits.1.w": torch.zeros(5),
}
ORIGINAL = {"stages.0.w": "conv1.weight", "stages.1.w": "layer1.weight", "exits.1.w": "fc.weight"}


@pytest.mark.parametrize("wrapped", ["", "module.", "checkpoint", "before 1.6"])
def test_a_state_dict_is_taken_by_its_original_names(wrapped, tmp_path):
    """fc has other classes, and what is no tensor counts nowhere."""
    path = tmp_path / "x.pth"
    given = {"conv1.weight": torch.ones(2, 2), "layer1.weight": torch.full((3,), 2.0)}
    given |= {"fc.weight": torch.zeros(1000), "layer9.weight": torch.zeros(1)}
    held: dict = {f"{wrapped if wrapped == 'module.' else ''}{n}": t for n, t in given.items()}
    is_archive = wrapped != "before 1.6"
    content = {"epoch": 3, "state_dict": held} if wrapped == "checkpoint" else held
    torch.save(content, path, _use_new_zipfile_serialization=is_archive)
    found, told = read_init(path, STAGED, ORIGINAL)
    assert {name: t.unique().tolist() for name, t in found.items()} == {
        "stages.0.w": [1.0],
        "stages.1.w": [2.0],
    }
    assert "2 of the model's 4 tensors" in told
    assert "1 of another shape: exits.1.w (fc.weight there) (1000,) instead of (5,)" in told
    assert "random: exits.0.w" in told
    assert "left out: layer9.weight" in told
    torch.save({name: t + 7 for name, t in held.items()}, path)
    assert found["stages.0.w"].tolist() == [[1.0, 1.0], [1.0, 1.0]], "no view of the file"


def test_several_tensors_may_begin_from_one(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"head": torch.arange(5.0)}, path)
    found, _ = read_init(path, STAGED, {"exits.0.w": "head", "exits.1.w": "head"})
    assert torch.equal(found["exits.0.w"], found["exits.1.w"])
    assert found["exits.0.w"].data_ptr() != found["exits.1.w"].data_ptr()


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"conv1.weight": torch.ones(4, 4), "layer1.weight": torch.ones(3)}, path)
    with pytest.raises(ConfigError, match="1 of another shape: stages.0.w.*of another model"):
        read_init(path, STAGED, ORIGINAL)


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_nothing_in_a_state_dict_is_run(tmp_path, capsys):
    path = tmp_path / "x.pt"
    torch.save({"conv1.weight": torch.ones(2, 2), "more": Harmful()}, path)
    with pytest.raises(ConfigError, match="no state dict of tensors alone"):
        read_init(path, STAGED, ORIGINAL)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", METHODS)
def test_every_method_begins_from_given_weights(name, tmp_path):
    """Its first round begins from them, whatever it keeps beside them."""
    unless_except(name, "begin")
    own = {"own": OWN[name]} if name in OWN else {}
    method = make_method(make_config(name, cnn(), rounds=1, **own))
    before = {name: tensor.clone() for name, tensor in method.current().items()}
    given = {name: t + 1 for name, t in before.items() if name.startswith("stages.0.")}
    assert given
    method.begin_from(given)
    for key, tensor in method.current().items():
        torch.testing.assert_close(tensor, given.get(key, before[key]))
    assert list(method.current()) == list(before), "in the model's order"


def test_a_run_begins_from_a_file_and_keeps_a_copy(tmp_path, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*RUN, "--run-dir", str(first)]) == 0
    init = tmp_path / "init.safetensors"
    (first / "model.safetensors").rename(init)
    flags = [*RUN, "--init", str(init), "--lr", "1e-9", "--run-dir", str(second)]
    with caplog.at_level(logging.INFO):
        assert main(flags) == 0
    assert "tensors begin from it" in caplog.text
    begun, now = load_file(init), load_file(second / "model.safetensors")
    weights = [name for name in begun if name.endswith("weight")]
    for name in weights:  # a learning rate of 1e-9 moves nothing
        torch.testing.assert_close(now[name], begun[name], atol=1e-5, rtol=0)
    init.unlink()
    flags[flags.index("--rounds") + 1] = "2"
    assert main([*flags, "--resume"]) == 0, "a run that goes on needs the file no more"


def test_a_run_killed_before_its_first_round_begins_from_its_copy(tmp_path):
    init = tmp_path / "x.safetensors"
    settings = config("owners-mean", init=str(init))
    method = make_method(settings)
    save_file({name: t + 1 for name, t in method.current().items()}, init)
    store = Store.create(tmp_path / "run", settings, "serve")
    load_state(store, method)
    store.close()
    init.unlink()
    again, resumed = make_method(settings), Store.resume(tmp_path / "run")
    load_state(resumed, again)
    resumed.close()
    for name, tensor in again.current().items():
        assert torch.equal(tensor, method.current()[name])


def test_a_file_that_is_not_there_makes_no_run(tmp_path, capsys):
    assert main([*RUN, "--init", "nowhere.safetensors", "--run-dir", str(tmp_path / "r")]) == 1
    assert "--init nowhere.safetensors cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
