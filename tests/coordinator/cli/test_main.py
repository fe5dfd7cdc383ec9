"""`edge-coordinator` as a person meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest
from safetensors import safe_open

from coordinator.cli.main import main
from coordinator.store.lock import RunLock
from tests.support.commands import EMULATE


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


@pytest.mark.parametrize(
    ("flags", "momentum", "lr", "distill"),
    [
        ([], 0.5, 0.75, "auto"),
        (["--server-optimizer", "fedyogi"], 0.9, 0.01, "auto"),
        (["--server-optimizer", "fedadam", "--server-lr", "0.5"], 0.9, 0.5, "auto"),
        (["--method", "owners-mean", "--server-optimizer", "fedadam"], 0.9, 0.01, "none"),
        (["--method", "owners-mean"], 0.5, 0.75, "none"),
        (["--method", "fedavg"], 0.0, 1.0, "none"),
        (["--paper"], 0.0, 1.0, "none"),
        (["--paper", "--server-optimizer", "fedadam"], 0.9, 0.01, "none"),
    ],
)
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
        assert json.loads(file.metadata()["model"])["spec"]["family"] == "cnn"
        assert "exits.2.2.weight" in file.keys()  # noqa: SIM118


def test_serve_gives_up_with_its_own_status_when_nobody_comes(tmp_path, capsys):
    serve = ["serve", "--run-dir", str(tmp_path / "run"), "--insecure", "--listen", "tcp://*:0"]
    alone = [*serve, "--input", "1x8x8", "--classes", "3", "--give-up-after", "0.2"]
    assert main([*alone, "--min-clients", "2"]) == 3
    error = capsys.readouterr().err
    assert "0 of the 2 devices that it needs are there" in error
    assert "--give-up-after" in error
    assert main([*alone, "--min-clients", "2", "--resume"]) == 3  # still the same run
    assert main(["--debug", *alone, "--min-clients", "2", "--resume"]) == 3, "who watches is told"


def test_one_process_at_a_time_writes_in_a_run_folder(tmp_path, capsys):
    folder = ["--run-dir", str(tmp_path / "run")]
    assert main([*EMULATE, *folder]) == 0
    holder = RunLock(tmp_path / "run")
    capsys.readouterr()
    assert main([*EMULATE, *folder, "--resume"]) == 1
    error = capsys.readouterr().err
    assert f"is in use by process {os.getpid()}; stop it first" in error
    assert error.count("\n") == 1
    holder.release()
    assert main([*EMULATE, *folder, "--resume"]) == 0


def test_zero_exit_weights_with_rotation_train_every_stage(tmp_path):
    run = settings(tmp_path, "--exit-weights", "0,0,1")
    assert run["rounds"][0]["returned"] == 4
    assert run["rounds"][0]["failures"] == 0


def test_a_result_file_is_written_beside_what_is_there(tmp_path, capsys):
    """A folder is refused before anything is trained; a file of the draft's old name stays."""
    (tmp_path / "folder").mkdir()
    assert main([*EMULATE, "--out", str(tmp_path / "folder")]) == 2
    captured = capsys.readouterr()
    assert f"--out {tmp_path / 'folder'} is no file" in captured.err
    assert captured.out == "", "no round was run"
    (tmp_path / "o.json.new").write_text("mine")
    settings(tmp_path)
    assert (tmp_path / "o.json.new").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "o.json", "o.json.new"]


def test_resume_names_the_settings_that_differ(tmp_path, capsys):
    folder = ["--run-dir", str(tmp_path / "run")]
    assert main([*EMULATE, *folder]) == 0
    capsys.readouterr()
    changed = ["--seed", "5", "--server-lr", "0.5", "--alpha", "2", "--option", "channels=4,4,4"]
    assert main([*EMULATE, *folder, "--resume", *changed]) == 1
    said = capsys.readouterr().err
    assert "--option {} (now {'channels': (4, 4, 4)}), --seed 0 (now 5)," in said
    assert "--server-lr 0.75 (now 0.5)" in said
    assert "--alpha 0.5 (now 2.0)" in said
    assert "--rounds" not in said.partition("; resume")[0]


def test_a_run_without_a_folder_is_not_to_be_resumed(capsys):
    """Its clients diverge at once: nobody returns anything."""
    assert main([*EMULATE, "--lr", "1e6", "--optimizer", "sgd"]) == 1
    said = capsys.readouterr().err
    assert "none of 6 participants returned an update" in said
    assert "nothing was kept without --run-dir" in said
    assert "--resume" not in said


def test_a_checkpoint_of_another_method_is_refused(tmp_path, capsys):
    svd = ["--generator", "svd-mlp", "--hidden", "8"]
    flags = {"one": [], "other": ["--method", "owners-mean"], "svd": svd}
    for name, more in flags.items():
        assert main([*EMULATE, *more, "--run-dir", str(tmp_path / name)]) == 0
    file = "round-000002.safetensors"
    for name, source in [("one", "other"), ("one", "svd"), ("other", "one"), ("svd", "one")]:
        folder = tmp_path / f"{name}-{source}"
        shutil.copytree(tmp_path / name, folder)
        shutil.copy(tmp_path / source / file, folder / file)
        capsys.readouterr()
        resume = [*flags[name], "--run-dir", str(folder), "--resume"]
        assert main([*EMULATE, *resume]) == 1
        said = capsys.readouterr().err
        assert f"checkpoint of round 2 in {folder} is not this run's: checkpoint" in said
        assert said.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_ends_a_run_of_several_processes_after_the_round(tmp_path):
    """A terminal sends it to the whole process group."""
    flags = ["--rounds", "500", "--run-dir", str(tmp_path / "run"), "--processes", "2"]
    running = subprocess.Popen(
        [sys.executable, "-m", "coordinator.cli", *EMULATE, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with running:
        assert running.stdout.readline().startswith("round 1: 4 of 4 returned")
        os.killpg(running.pid, signal.SIGINT)
        out, said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    rounds = out.splitlines()  # after the first, where the signal fell between two: none
    assert all("4 of 4 returned" in line for line in rounds)
    assert f"round {len(rounds) + 2} was next, go on with --resume" in said


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
    assert main(["clients", "add", "pi-3", "short", "--keys", keys]) == 2
    assert "40 characters" in capsys.readouterr().err


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
        "name": "svd-mlp",
        "rank": 100,
        "hidden": 512,
        "epochs": 25,
        "lr": 5e-4,
    }
    own = settings(tmp_path, "--paper", "--rank", "7", "--serve", "ema")["config"]
    assert (own["generator"]["rank"], own["server"]["serve"]) == (7, "ema")


def test_a_flag_whose_name_begins_another_changes_nothing_else(tmp_path):
    """--serve was taken for a shortened --server-optimizer, whose defaults ruin a plain server."""
    plain, last = settings(tmp_path)["config"], settings(tmp_path, "--serve", "last")["config"]
    assert last["server"] == plain["server"] | {"serve": "last"}


def test_a_shortened_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*EMULATE, "--server-optimize", "fedadam"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --server-optimize" in capsys.readouterr().err


def test_personalised_accuracy_is_told_by_group(tmp_path, capsys):
    content = settings(tmp_path, "--personalise", "1")
    groups = content["personalised"]["groups"]
    assert {name: group["clients"] for name, group in groups.items()} == {
        "all": 6,
        "exit 1": 2,
        "exit 2": 2,
        "exit 3": 2,
    }
    assert "exit 1: 2 clients, accuracy on their own hold-outs" in capsys.readouterr().out
    assert content["config"]["holdout"] == 0.2
    assert len(content["personal"]) == 6, "of each client: what its own model answers"
    held = sum(result["num_examples"] for result in content["personal"].values())
    right = sum(r["metric"] * r["num_examples"] for r in content["personal"].values())
    assert content["rounds"][-1]["figures"]["personal_accuracy"] == pytest.approx(right / held)
    assert content["personalised"]["groups"]["all"]["before"] > 0


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
