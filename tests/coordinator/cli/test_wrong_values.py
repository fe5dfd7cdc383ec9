"""What is typed wrong for `emulate` and `serve`: one line that names the flag, before any work."""

from __future__ import annotations

import pytest

from coordinator.cli.main import main
from tests.support.commands import EMULATE, status_of


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--model", "resnet99"], "known: cnn, "),
        (["--groups", "1,2"], "groups 1,2"),
        (["--groups", "a,b"], "--groups: 'a,b', expected whole numbers"),
        (["--option", "depth=3"], "no option depth"),
        (["--option", "channels=4"], "channels"),
        (["--batch-size", "1"], "--batch-size: '1', expected a whole number, at least 2"),
        (["--gain", "2"], "--gain: '2', expected a number, at most 1"),
        (["--rounds", "0"], "--rounds: '0', expected a whole number, at least 1"),
        (["--participants", "0"], "--participants: '0'"),
        (["--participants", "7"], "--participants 7, expected at most the 6 --clients"),
        (["--fit-epochs", "0"], "--fit-epochs: '0'"),
        (["--distill-ramp", "-1"], "--distill-ramp: '-1'"),
        (["--rank", "0"], "--rank: '0'"),
        (["--hidden", "1000000000000000"], "--hidden: '1000000000000000'"),
        (["--server-lr", "inf"], "--server-lr: 'inf', expected a number"),
        (["--epochs", "200000"], "--epochs is 200000, expected a whole number, at most 100000"),
        (["--batch-size", "2000000"], "--batch-size is 2000000, expected a whole number, at most"),
        (["--lr", "inf"], "--lr: 'inf'"),
        (["--weight-decay", "1e7"], "--weight-decay is 10000000.0"),
        (["--prox-mu", "1e7"], "--prox-mu is 10000000.0"),
        (
            ["--exit-weights", "1,1e7,1"],
            "--exit-weights is (1.0, 10000000.0, 1.0), expected a",
        ),
        (["--exit-weights", "0,0,0"], "--exit-weights are all 0"),
        (["--method", "stage-rotation", "--rotation", "off"], "--rotation off is owners-mean"),
        (["--method", "fedavg-l", "--rotation", "add"], "--rotation add has no place there"),
        (["--method", "fedavg-s", "--distill", "mutual"], "--distill mutual has no place there"),
        (["--method", "fedavg-l", "--damping", "1"], "--damping 1.0 has no place there; leave it"),
        (["--option", "channels=1000000,1000000,4"], "out of memory making hypemefed"),
        (["--option", "channels=99999999999999999999,4,4"], "channels"),
        (["--device", "meta"], "--device: 'meta', expected auto, cpu, cuda or cuda:N"),
        (["--device", "mps"], "--device: 'mps'"),
        (["--device", "cuda:99"], "--device 'cuda:99'"),
        (["--out", "."], "--out . is no file"),
        (["--out", "/dev/null"], "--out /dev/null is no file"),
        (["--resume"], "--resume has no effect without --run-dir"),
        (["--device", "tpu7"], "--device"),
        (["--alpha", "-1"], "alpha"),
        (["--exits", "0"], "exit"),
        (["--split", "subject"], "subject"),
    ],
    ids=str,
)
def test_bad_settings_are_one_clear_line(capsys, flags, said):
    is_typed = said not in ("nowhere", "out of memory making hypemefed", "subject")
    assert status_of(main, [*EMULATE, *flags]) == 1 + is_typed
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith(("edge-coordinator: ", "edge-coordinator emulate: "))
    assert captured.err.count("\n") == 1, captured.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "0"], "--rounds: '0'"),
        (["--exits", "0"], "--exits: '0'"),
        (["--alpha", "0"], "--alpha: '0', expected a number above 0"),
        (["--holders", "nan"], "--holders: 'nan', expected a share"),
        (["--clients", "0", "--groups", "0"], "--clients: '0', expected a whole number from 1"),
        (
            ["--groups", "1,2"],
            "--groups 1,2 need to sum to 6 clients over at most 3 exits; give such as 2,2,2",
        ),
        (["--model", "resnet99"], "known: cnn, "),
        (["--method", "stage-rotation", "--rotation", "off"], "--rotation off is owners-mean"),
        (["--out", "."], "--out . is no file"),
        (["--run-dir", "nowhere", "--resume"], "nowhere holds no run"),
    ],
    ids=str,
)
def test_wrong_values_are_told_before_data_is_read(capsys, flags, said):
    status = 1 if "--run-dir" in flags else 2
    assert status_of(main, [*EMULATE, "--data", "nowhere", *flags]) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--exits", "2"], ["--clients", "4"]], ids=str)
def test_groups_follow_clients_and_exits(capsys, flags):
    assert status_of(main, ["emulate", "--data", "nowhere", *flags]) == 1
    assert "'nowhere'" in capsys.readouterr().err  # the data are read after the groups


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "0"], "--rounds: '0'"),
        (["--quorum", "2"], "--quorum: '2'"),
        (["--method", "fedavg-s", "--rotation", "add"], "--rotation add has no place there"),
        (["--model", "resnet99"], "unknown model family"),
        (["--listen", "5555"], "tcp://HOST:PORT"),
        (["--metrics", "9464"], "HOST:PORT"),
        (["--memory-budget", "10K"], "--memory-budget is 10240 bytes"),
        (["--keys", "no-keys"], "server.public"),
        (["--resume"], "holds no run"),
    ],
    ids=str,
)
def test_serve_tells_wrong_values_before_data_is_read(tmp_path, capsys, flags, said):
    run = ["--run-dir", str(tmp_path / "run"), "--test", "nowhere"]
    is_typed = flags[0] not in ("--keys", "--resume")
    assert status_of(main, ["serve", *run, *flags]) == 1 + is_typed
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
        ([*shape, "--deadline", "inf"], "--deadline: 'inf', expected a number"),
        ([*shape, "--grace", "0"], "--grace: '0', expected a number, above 0"),
        (["--input", "1x8x8", "--classes", "1"], "--classes: got 1 class, expected at least 2"),
    ]:
        assert status_of(main, [*serve, *flags]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_late_updates_cannot_be_dropped_in_an_asynchronous_run(tmp_path, capsys):
    serve = ["serve", "--run-dir", str(tmp_path / "run"), "--insecure", "--listen", "tcp://*:0"]
    flags = ["--input", "1x8x8", "--classes", "3", "--mode", "async", "--late", "drop"]
    assert main([*serve, *flags]) == 2
    assert "--late drop has no place with --mode async" in capsys.readouterr().err
    budget = ["--input", "1x8x8", "--classes", "3", "--memory-budget", "10K"]
    assert main([*serve, *budget]) == 2
    assert "--memory-budget is 10240 bytes, expected at least 1048576" in capsys.readouterr().err


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


def test_serve_says_what_lacks(tmp_path, capsys):
    folder = ["--run-dir", str(tmp_path / "run")]
    assert main(["serve", *folder]) == 2
    assert "--test" in capsys.readouterr().err
    assert main(["serve", "--test", "digits"]) == 2
    assert "--run-dir" in capsys.readouterr().err
    assert main(["serve", *folder, "--test", "digits", "--keys", str(tmp_path)]) == 1
    assert "server.public" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_preset_without_its_data_says_which_files(capsys):
    assert main(["emulate", "--preset", "svhn"]) == 1
    assert "train_32x32.mat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--examples", "99999"], "--examples 99999, expected 1 to 1438, all that there are"),
        (["--test-examples", "99999"], "--test-examples 99999, expected 1 to 359, all that there"),
        (["--option", "channels=a"], "option channels is 'a', expected a whole number or a list"),
        (
            ["--option", "channels=0,4,4"],
            "option channels is (0, 4, 4), expected a whole number, at",
        ),
    ],
    ids=str,
)
def test_values_that_data_and_model_bound_name_what_was_typed(capsys, flags, said):
    assert status_of(main, [*EMULATE, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
