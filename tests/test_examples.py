"""Every program in examples/ runs; client.py, which needs a coordinator, in test_client.py,
own_method.py, own_rule.py and own_generator.py in test_own_method.py, minimal_device.py in
tools/test_conformance.py."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from coordinator.cli.main import main as coordinate
from edge_sdk.data import save_shard
from edge_sdk.infer.export import export
from edge_sdk.models import build, original_names
from tests.support.examples import cnn, examples
from tests.support.packages import package_or_skip
from tests.support.processes import (
    PATIENCE_S,
    ROOT,
    environment,
    free_port,
    kill_marked,
    read_rows,
)

FOLDER = ROOT / "examples"
MOST_LINES = {"minimal_device.py": 255}  # of any other: 40


def main_of(name: str) -> Callable[..., None]:
    main: Callable[..., None] = runpy.run_path(str(FOLDER / name))["main"]
    return main


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.*")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_it_is_called(path):
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES.get(path.name, 40)
    said = f"examples/{path.name}" in text
    assert said or f"--import {path.stem}" in text


def test_a_run_from_python(tmp_path, capsys):
    main_of("run_from_python.py")(str(tmp_path / "run"), rounds=2)
    *rounds, last = capsys.readouterr().out.splitlines()
    said = "round {}: 6 of 6 returned"
    assert [line.split(",")[0] for line in rounds] == [said.format(1), said.format(2)]
    assert last == f"model: {tmp_path / 'run' / 'model.safetensors'}"
    assert (tmp_path / "run" / "model.safetensors").stat().st_size > 1000


def test_a_regression_is_trained_exported_and_asked(tmp_path, capsys):
    main_of("regression.py")(str(tmp_path / "a"), rounds=2)
    said = capsys.readouterr().out
    assert "round 2: 6 of 6 returned, RMSE per exit " in said
    assert "1 values, exits 1 to 2" in said
    assert 40 < float(said.splitlines()[-1].split()[1]) < 90, "its deviation is 77"


def test_a_llama_learns_a_text_by_adapters_and_writes(tmp_path, capsys):
    main_of("llama_adapters.py")(str(tmp_path / "run"), rounds=1)
    assert re.match(r"b'.+' at exit [12]\.\d on average", capsys.readouterr().out.splitlines()[-1])
    first, second = (
        load_file(tmp_path / "run" / n / "model.safetensors") for n in ("first", "second")
    )
    stages = [name for name in first if name.startswith("stages.")]
    assert all(torch.equal(first[name], second[name]) for name in stages)


def test_an_own_family_trains(own_things, capsys):
    flags = "emulate --import own_family --model perceptron --option width=8 --data digits"
    small = "--examples 60 --test-examples 20 --clients 3 --groups 1,1,1 --rounds 1 --epochs 1"
    assert coordinate([*flags.split(), *small.split(), "--split", "iid"]) == 0
    assert capsys.readouterr().out.startswith("round 1: 3 of 3 returned")


def test_an_own_module_trains(own_things, capsys):
    flags = "emulate --import own_module --model blocks --data digits --method fedavg-s"
    small = "--examples 60 --test-examples 20 --clients 3 --groups 1,1,1 --rounds 1 --epochs 1"
    assert coordinate([*flags.split(), *small.split(), "--split", "iid"]) == 0
    assert capsys.readouterr().out.startswith("round 1: 3 of 3 returned")
    spec = replace(cnn(), family="blocks")
    assert original_names(spec)["stages.1.block2.0.weight"] == "block2.0.weight"


def test_a_model_of_torchvision_trains_and_answers(tmp_path, capsys):
    package_or_skip("torchvision")
    main_of("torchvision_model.py")(str(tmp_path / "run"), rounds=1, examples=50)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("round 1: 3 of 3 returned")
    assert re.fullmatch(r"labels( \d){5} at exits( [123]){5}", last)


def test_a_prefix_of_the_own_family_holds_the_same_tensors(own_things):
    runpy.run_path(str(FOLDER / "own_family.py"))
    spec = replace(cnn(), family="perceptron", options={"width": 8})
    shapes: list[dict[str, Any]] = [
        {n: tensor.shape for n, tensor in build(replace(spec, exit=exit)).tensors().items()}
        for exit in (2, 3)
    ]
    assert shapes[0].items() < shapes[1].items()


def test_a_pre_trained_body_stays_frozen(own_things, tmp_path, capsys, caplog):
    file, run = str(tmp_path / "body.pt"), tmp_path / "run"
    command = [sys.executable, FOLDER / "pretrained.py", file]
    subprocess.run(command, env=environment("") | {"PYTHONPATH": str(ROOT)}, check=True)
    flags = "emulate --import pretrained --model body --exits 2 --data digits --freeze backbone"
    small = "--examples 90 --test-examples 20 --clients 3 --groups 2,1 --rounds 2 --epochs 1"
    given = ["--split", "iid", "--init", file, "--run-dir", str(run)]
    assert coordinate([*flags.split(), *small.split(), *given]) == 0
    assert "14 of the model's 18 tensors begin from it" in caplog.text
    served, begun = load_file(run / "model.safetensors"), torch.load(file, weights_only=True)
    for name, tensor in begun.items():
        if not name.startswith("3."):  # its own classifier, of even and odd
            assert torch.equal(served[f"stages.{name}"], tensor), name
    down = dict(read_rows(run, "SELECT round, SUM(bytes_down) FROM participations GROUP BY round"))
    assert down[1] > down[2] > 0, "what is frozen travels once"


def test_early_exit_says_where_examples_stopped(tmp_path, capsys):
    """Without a calibration all go to the last exit, whose accuracy torch computes as well."""
    torch.manual_seed(0)
    spec, data = cnn(), examples(30)
    model = build(spec).eval()
    export(spec, model.tensors(), tmp_path / "model", examples=data)
    save_shard(tmp_path / "data.npz", data)
    with torch.no_grad():
        found = model(torch.from_numpy(data.x))[-1].argmax(1).numpy()
    main_of("early_exit.py")(str(tmp_path / "model"), str(tmp_path / "data.npz"))
    assert capsys.readouterr().out.splitlines() == [
        f"accuracy {np.mean(found == data.y):.3f} on 30 examples",
        "stopped at exit 1: 0%",
        "stopped at exit 2: 0%",
        "stopped at exit 3: 100%",
    ]


@pytest.mark.slow
def test_two_devices_train_over_encrypted_links(tmp_path):
    mark = uuid4().hex
    known = environment(mark) | {"PYTHON": sys.executable, "PORT": str(free_port())}
    known["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    known["HOME"] = str(tmp_path)
    try:
        ended = subprocess.run(
            [FOLDER / "two_devices.sh", tmp_path / "new"],
            capture_output=True,
            text=True,
            env=known,
            timeout=3 * PATIENCE_S,
            check=False,
        )
        logs = [path.read_text()[-1000:] for path in (tmp_path / "new").glob("*.log")]
        assert ended.returncode == 0, "\n".join([ended.stderr, *logs])
    finally:
        kill_marked(mark)
    query = "SELECT client_id, outcome, COUNT(*) FROM participations GROUP BY 1, 2 ORDER BY 1"
    rows = read_rows(tmp_path / "new" / "run", query)
    assert rows == [("pi-1", "ok", 3), ("pi-2", "ok", 3)]
    assert "finished, round 3 of 3" in ended.stdout


def test_an_own_reader_reads_and_refuses(tmp_path):
    pixels = [[3, *[0] * 783, 255], [7, *[255] * 784]]
    (tmp_path / "pixels.csv").write_text("\n".join(",".join(map(str, line)) for line in pixels))
    code = (
        "import sys, own_reader; from edge_sdk.data import load\n"
        "name, train, test = load(sys.argv[1])\n"
        "print(name, train.x.shape, train.y.tolist(), train.x[0, 0, -1, -2:].tolist(), test)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}"}

    def run():
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    # 0 and 255 become -1 and 1
    assert run().stdout == "pixels (2, 1, 28, 28) [3, 7] [-1.0, 1.0] None\n"
    (tmp_path / "pixels.csv").write_text("3,0,255")
    assert run().stderr.endswith(
        "pixels.csv: got lines of 3 numbers, expected lines of a label and 784 numbers from 0 to "
        "255; correct the data\n"
    )


def test_a_run_of_several_backbones(tmp_path, capsys):
    """As the file says it, on few examples."""
    path = FOLDER / "backbones.toml"
    (line,) = re.findall(r"^#     (edge-coordinator emulate .*)$", path.read_text(), re.M)
    command = line.replace("examples/backbones.toml", str(path)).split()[1:]
    few = ["--rounds", "1", "--clients", "4", "--examples", "80", "--test-examples", "40"]
    assert coordinate([*command, *few, "--epochs", "1", "--run-dir", str(tmp_path / "run")]) == 0
    assert re.search(r"small [\d.]+ / [\d.]+ %, large [\d.]+ / [\d.]+ %", capsys.readouterr().out)
    models = [tmp_path / "run" / f"model-{name}.safetensors" for name in ("small", "large")]
    assert all(path.stat().st_size > 1000 for path in models)
