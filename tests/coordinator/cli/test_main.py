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

EMULATE = [
    "emulate",
    "--data",
    "digits",
    "--clients",
    "6",
    "--groups",
    "2,2,2",
    "--rounds",
    "2",
    "--participants",
    "4",
    "--batch-size",
    "8",
    "--epochs",
    "1",
    "--examples",
    "300",
]


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
        (["--method", "owners-mean"], 0.0, 1.0, "none"),
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
        assert json.loads(file.metadata()["spec"])["family"] == "cnn"
        assert "exits.2.2.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--model", "resnet99"], "known: cnn, lstm, mlp, resnet18, vgg"),
        (["--groups", "1,2"], "groups 1,2"),
        (["--groups", "a,b"], "--groups 'a,b'"),
        (["--option", "depth=3"], "no option depth"),
        (["--option", "channels=4"], "channels"),
        (["--batch-size", "1"], "--batch-size is 1: Expected `int` >= 2"),
        (["--gain", "2"], "--gain is 2.0"),
        (["--rounds", "0"], "--rounds is 0: Expected `int` >= 1"),
        (["--participants", "0"], "--participants is 0"),
        (["--fit-epochs", "0"], "--fit-epochs is 0"),
        (["--distill-ramp", "-1"], "--distill-ramp is -1"),
        (["--rank", "0"], "--rank is 0"),
        (["--hidden", "1000000000000000"], "--hidden is 1000000000000000"),
        (["--server-lr", "inf"], "--server-lr is inf: Expected `float` <= 1000"),
        (["--epochs", "200000"], "--epochs is 200000: Expected `int` <= 100000"),
        (["--batch-size", "2000000"], "--batch-size is 2000000: Expected `int` <= 1000000"),
        (["--lr", "inf"], "--lr is inf"),
        (["--weight-decay", "1e7"], "--weight-decay is 10000000.0"),
        (["--prox-mu", "1e7"], "--prox-mu is 10000000.0"),
        (["--exit-weights", "1,1e7,1"], "--exit-weights is (1.0, 10000000.0, 1.0): Expected"),
        (["--exit-weights", "0,0,0"], "--exit-weights are all 0"),
        (["--method", "stage-rotation", "--rotation", "off"], "--rotation off is owners-mean"),
        (["--method", "fedavg-l", "--rotation", "add"], "--rotation add has no place there"),
        (["--option", "channels=1000000,1000000,4"], "out of memory making hypemefed"),
        (["--option", "channels=99999999999999999999,4,4"], "channels"),
        (["--device", "meta"], "--device 'meta' is not supported; use cpu or cuda"),
        (["--device", "mps"], "--device 'mps'"),
        (["--device", "cuda:99"], "--device 'cuda:99'"),
        (["--out", "."], "--out . is no file"),
        (["--out", "/dev/null"], "--out /dev/null is no file"),
        (["--resume"], "--resume needs --run-dir"),
        (["--device", "tpu7"], "--device"),
        (["--alpha", "-1"], "alpha"),
        (["--exits", "0"], "exit"),
        (["--split", "subject"], "subject"),
    ],
    ids=str,
)
def test_bad_settings_are_one_clear_line(capsys, flags, said):
    assert main([*EMULATE, *flags]) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("edge-coordinator: ")
    assert captured.err.count("\n") == 1, captured.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--exits", "0"], "--exits is 0"),
        (["--alpha", "0"], "Dirichlet alpha is 0.0"),
        (["--holders", "nan"], "--holders nan, expected a share"),
        (["--clients", "0", "--groups", "0"], "--clients is 0, expected at least 1"),
        (["--groups", "1,2"], "groups 1,2 need to sum to 6"),
        (["--model", "resnet99"], "known: cnn, lstm, mlp, resnet18, vgg"),
        (["--method", "stage-rotation", "--rotation", "off"], "--rotation off is owners-mean"),
        (["--out", "."], "--out . is no file"),
        (["--run-dir", "nowhere", "--resume"], "nowhere holds no run"),
    ],
    ids=str,
)
def test_wrong_values_are_told_before_data_is_read(capsys, flags, said):
    assert main([*EMULATE, "--data", "nowhere", *flags]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--quorum", "2"], "--quorum is 2.0"),
        (["--method", "fedavg-s", "--rotation", "add"], "--rotation add has no place there"),
        (["--model", "resnet99"], "unknown model family"),
        (["--listen", "5555"], "tcp://HOST:PORT"),
        (["--metrics", "9464"], "HOST:PORT"),
        (["--memory-budget", "10"], "--memory-budget is 10 bytes"),
        (["--keys", "no-keys"], "server.public"),
        (["--resume"], "holds no run"),
    ],
    ids=str,
)
def test_serve_tells_wrong_values_before_data_is_read(tmp_path, capsys, flags, said):
    run = ["--run-dir", str(tmp_path / "run"), "--test", "nowhere"]
    assert main(["serve", *run, *flags]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_wrong_usage_exits_with_two(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["emulate", "--method", "fedavgx"])
    assert stop.value.code == 2
    assert "hypemefed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--threads", "99999999999999999999"],
        ["--threads", "0"],
        ["--processes", "0"],
        ["--personalise", "200000"],
        ["--run-dir", ""],
        ["--out", ""],
        ["--option", "channels"],
        ["--option", "channels=4,"],
    ],
    ids=str,
)
def test_values_that_no_run_can_have_are_wrong_usage(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main([*EMULATE, *flags])
    assert stop.value.code == 2
    assert f"argument {flags[0]}: {flags[1]!r}, expected" in capsys.readouterr().err


def test_serve_refuses_what_devices_would(tmp_path, capsys):
    serve = ["serve", "--run-dir", str(tmp_path / "run"), "--insecure", "--listen", "tcp://*:0"]
    shape = ["--input", "1x8x8", "--classes", "3"]
    for flags, said in [
        ([*shape, "--deadline", "inf"], "--deadline is inf: Expected `float` <= 1000000000"),
        ([*shape, "--grace", "0"], "--grace is 0.0: Expected `float` > 0"),
        (["--input", "1x8x8", "--classes", "1"], "--classes: got 1 class, expected at least 2"),
    ]:
        assert main([*serve, *flags]) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing was begun"


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


def test_late_updates_cannot_be_dropped_in_an_asynchronous_run(tmp_path, capsys):
    serve = ["serve", "--run-dir", str(tmp_path / "run"), "--insecure", "--listen", "tcp://*:0"]
    flags = ["--input", "1x8x8", "--classes", "3", "--mode", "async", "--late", "drop"]
    assert main([*serve, *flags]) == 1
    assert "--late drop has no place with --mode async" in capsys.readouterr().err
    budget = ["--input", "1x8x8", "--classes", "3", "--memory-budget", "10"]
    assert main([*serve, *budget]) == 1
    assert "--memory-budget is 10 bytes, expected at least 1048576" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--give-up-after", "-1"],
        ["--give-up-after", "nan"],
        ["--memory-budget", "much"],
        ["--input", "a"],
    ],
)
def test_serve_values_out_of_range_are_wrong_usage(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--run-dir", str(tmp_path / "run"), *flags])
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_zero_exit_weights_with_rotation_train_every_stage(tmp_path):
    run = settings(tmp_path, "--exit-weights", "0,0,1")
    assert run["rounds"][0]["returned"] == 4
    assert run["rounds"][0]["failures"] == 0


def test_a_result_file_is_written_beside_what_is_there(tmp_path, capsys):
    """A folder is refused before anything is trained; a file of the draft's old name stays."""
    (tmp_path / "folder").mkdir()
    assert main([*EMULATE, "--out", str(tmp_path / "folder")]) == 1
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
    flags = {"one": [], "other": ["--method", "owners-mean"], "svd": ["--generator", "svd-mlp"]}
    for name, more in flags.items():
        assert main([*EMULATE, *more, "--hidden", "8", "--run-dir", str(tmp_path / name)]) == 0
    file = "round-000002.safetensors"
    for name, source in [("one", "other"), ("one", "svd"), ("other", "one"), ("svd", "one")]:
        folder = tmp_path / f"{name}-{source}"
        shutil.copytree(tmp_path / name, folder)
        shutil.copy(tmp_path / source / file, folder / file)
        capsys.readouterr()
        resume = [*flags[name], "--hidden", "8", "--run-dir", str(folder), "--resume"]
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
        "name": "svd-mlp",
        "rank": 100,
        "hidden": 512,
        "epochs": 25,
        "lr": 5e-4,
    }
    own = settings(tmp_path, "--paper", "--rank", "7", "--serve", "ema")["config"]
    assert (own["generator"]["rank"], own["server"]["serve"]) == (7, "ema")


def test_preset_without_its_data_says_which_files(capsys):
    assert main(["emulate", "--preset", "svhn"]) == 1
    assert "train_32x32.mat" in capsys.readouterr().err


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
