"""`edge-coordinator` as a person meets it."""

from __future__ import annotations

import json
import os
import stat

import pytest
from safetensors import safe_open

from coordinator.cli import main

EMULATE = [
    "emulate", "--data", "digits", "--clients", "6", "--groups", "2,2,2", "--rounds", "2",
    "--participants", "4", "--batch-size", "8", "--epochs", "1", "--examples", "300",
]  # fmt: skip


@pytest.mark.parametrize("method", ["hypemefed", "stage-rotation"])
def test_emulate_prints_a_line_a_round_and_writes_json(tmp_path, capsys, method):
    out = tmp_path / "out.json"
    flags = ["--method", method, "--rotation-stages", "1", "--out", str(out)]
    assert main([*EMULATE, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["round 1", "round 2"]
    content = json.loads(out.read_text())
    assert content["config"]["method"] == method
    assert content["config"]["groups"] == [2, 2, 2]
    first, second = content["rounds"]
    assert (first["round"], second["round"]) == (1, 2)
    for row in (first, second):
        assert len(row["accuracy"]) == len(row["accuracy_served"]) == 3
        assert all(0 <= share <= 1 for share in row["accuracy"])
        assert {"train", "aggregate", "evaluate", "checkpoint"} <= set(row["seconds"])
        assert row["bytes_down"] > 0 < row["bytes_up"]
    if method == "stage-rotation":  # frozen stages travel down only
        assert first["bytes_up"] + second["bytes_up"] < first["bytes_down"] + second["bytes_down"]


@pytest.mark.parametrize(("flags", "momentum", "lr", "distill"), [
    ([], 0.5, 0.75, "auto"),
    (["--server-optimizer", "fedyogi"], 0.9, 0.01, "auto"),
    (["--server-optimizer", "fedadam", "--server-lr", "0.5"], 0.9, 0.5, "auto"),
    (["--method", "owners-mean", "--server-optimizer", "fedadam"], 0.9, 0.01, "none"),
    (["--method", "owners-mean"], 0.0, 1.0, "none"),
    (["--paper"], 0.0, 1.0, "none"),
    (["--paper", "--server-optimizer", "fedadam"], 0.9, 0.01, "none"),
])  # fmt: skip
def test_defaults_follow_method_and_optimizer(tmp_path, flags, momentum, lr, distill):
    """An adaptive server with fedavgm's lr of 1 moves every weight by about 1: 10 % accuracy."""
    out = tmp_path / "out.json"
    assert main([*EMULATE, "--rounds", "1", *flags, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    server = content["config"]["server"]
    assert (server["momentum"], server["lr"]) == (momentum, lr)
    assert content["config"]["distill"]["direction"] == distill
    assert content["rounds"][0]["accuracy"]


def test_run_folder_resumes_and_holds_the_model(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert main([*EMULATE, "--run-dir", folder]) == 0
    assert main([*EMULATE, "--run-dir", folder]) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*EMULATE, "--run-dir", folder, "--resume", "--seed", "5"]) == 1
    assert "other settings" in capsys.readouterr().err
    assert main([*EMULATE, "--run-dir", folder, "--resume"]) == 0
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["spec"])["family"] == "cnn"
        assert "exits.2.2.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize(("flags", "said"), [
    (["--data", "nowhere"], "nowhere"),
    (["--model", "resnet99"], "known: cnn, lstm, mlp, resnet18, vgg"),
    (["--groups", "1,2"], "groups 1,2"),
    (["--groups", "a,b"], "--groups 'a,b'"),
    (["--option", "channels"], "KEY=VALUE"),
    (["--option", "depth=3"], "no option depth"),
    (["--option", "channels=4"], "channels"),
    (["--batch-size", "1"], "batch_size"),
    (["--gain", "2"], "gain"),
    (["--rounds", "0"], "rounds"),
    (["--device", "tpu7"], "--device"),
    (["--alpha", "-1"], "alpha"),
    (["--exits", "0"], "exit"),
    (["--split", "subject"], "subject"),
], ids=str)  # fmt: skip
def test_bad_settings_are_one_clear_line(capsys, flags, said):
    assert main([*EMULATE, *flags]) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("edge-coordinator: ")
    assert captured.err.count("\n") == 1, captured.err


def test_wrong_usage_exits_with_two(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["emulate", "--method", "fedavgx"])
    assert stop.value.code == 2
    assert "hypemefed" in capsys.readouterr().err


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="nowhere"):
        main(["--debug", *EMULATE, "--data", "nowhere"])


def test_keys_and_clients(tmp_path, capsys):
    keys = str(tmp_path / "keys")
    assert main(["keys", "--keys", keys]) == 0
    secret = tmp_path / "keys" / "server.secret"
    assert stat.S_IMODE(os.stat(secret).st_mode) == 0o600
    assert main(["keys", "--keys", keys]) == 1, "never overwritten"
    key = (tmp_path / "keys" / "server.public").read_text().strip()
    assert main(["clients", "add", "pi-1", key, "--keys", keys]) == 0
    capsys.readouterr()
    assert main(["clients", "list", "--keys", keys]) == 0
    assert capsys.readouterr().out == f"pi-1 {key}\n"
    assert main(["clients", "add", "pi-2", key, "--keys", keys]) == 1
    assert main(["clients", "add", "pi-3", "short", "--keys", keys]) == 1
    assert "40 characters" in capsys.readouterr().err


def test_serve_says_what_lacks(tmp_path, capsys):
    folder = ["--run-dir", str(tmp_path / "run")]
    assert main(["serve", *folder]) == 1
    assert "--test" in capsys.readouterr().err
    assert main(["serve", "--test", "digits"]) == 1
    assert "--run-dir" in capsys.readouterr().err
    assert main(["serve", *folder, "--test", "digits", "--keys", str(tmp_path)]) == 1
    assert "server.public" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing was begun"


def settings(tmp_path, *flags):
    out = tmp_path / "o.json"
    assert main([*EMULATE, *flags, "--rounds", "1", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_default_and_paper_settings(tmp_path):
    best = settings(tmp_path)["config"]
    assert best["method"] == "hypemefed"
    assert best["rotation"] == {"mode": "add", "stages": 0, "draw": "uniform"}
    assert (best["generator"]["name"], best["server"]["serve"]) == ("update-regression", "ema")
    paper = settings(tmp_path, "--paper")["config"]
    assert paper["rotation"]["mode"] == "off"
    assert paper["server"]["serve"] == "last"
    assert (paper["server"]["momentum"], paper["server"]["lr"]) == (0.0, 1.0)
    assert {k: paper["generator"][k] for k in ("name", "rank", "hidden", "epochs", "lr")} == {
        "name": "svd-mlp", "rank": 100, "hidden": 512, "epochs": 25, "lr": 5e-4,
    }  # fmt: skip
    own = settings(tmp_path, "--paper", "--rank", "7", "--serve", "ema")["config"]
    assert (own["generator"]["rank"], own["server"]["serve"]) == (7, "ema")


def test_preset_without_its_data_says_which_files(capsys):
    assert main(["emulate", "--preset", "svhn"]) == 1
    assert "train_32x32.mat" in capsys.readouterr().err


def test_personalised_accuracy_is_told_by_group(tmp_path, capsys):
    content = settings(tmp_path, "--personalise", "1")
    groups = content["personalised"]["groups"]
    assert {name: group["clients"] for name, group in groups.items()} == {
        "all": 6, "exit 1": 2, "exit 2": 2, "exit 3": 2,
    }  # fmt: skip
    assert "exit 1: 2 clients, accuracy on their own hold-outs" in capsys.readouterr().out
    assert content["config"]["holdout"] == 0.2


@pytest.mark.slow
def test_processes_give_the_same_bytes(tmp_path):
    """And a client that cannot train is a failure there too."""
    found = []
    for processes in ("1", "2"):
        folder = tmp_path / processes
        flags = ["--clients", "12", "--groups", "6,6", "--alpha", "0.05", "--participants", "12"]
        assert main([*EMULATE, *flags, "--run-dir", str(folder), "--processes", processes]) == 0
        found.append((folder / "model.safetensors").read_bytes())
    assert found[0] == found[1]
