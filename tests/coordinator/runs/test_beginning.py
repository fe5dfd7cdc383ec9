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
from tests.support.examples import cnn, config

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


@pytest.mark.parametrize("name", METHODS)
def test_every_method_begins_from_given_weights(name, tmp_path):
    """Its first round begins from them, whatever it keeps beside them."""
    unless_except(name, "begin")
    method = make_method(make_config(name, cnn(), rounds=1))
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
