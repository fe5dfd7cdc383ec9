"""Where the commands write: a path that cannot be is told before any work, by the name that was
given, with what to do; folders that lack are made."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from coordinator.cli.main import main as coordinate
from edge_sdk.cli.main import main as on_device
from edge_sdk.data.loading import load_test
from edge_sdk.infer.export import export
from edge_sdk.models import initial_tensors
from tests.support.commands import status_of
from tests.support.examples import cnn

EMULATE = "emulate --rounds 1 --clients 3 --groups 1,1,1 --examples 100"
DATA = "--data digits"


def words(line: str) -> list[str]:
    return line.split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a file `file` and an exported model `model`."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    spec = replace(cnn(), num_classes=10)
    export(spec, initial_tensors(spec, 0), Path("model"), examples=load_test("digits"))
    return tmp_path


@pytest.mark.parametrize(
    ("main", "line", "where"),
    [
        (coordinate, f"{EMULATE} --out", "o.json"),
        (coordinate, f"{EMULATE} --run-dir", "run"),
        (coordinate, f"{EMULATE} --export", "exported"),
        (coordinate, "keys --keys", "keys"),
        (on_device, "keys --id a --keys", "keys"),
        (on_device, "measure --save", "x.toml"),
        (on_device, f"infer model {DATA} --out", "x.csv"),
        (on_device, f"infer-report model {DATA} --out", "report"),
        (on_device, "export model --exit 1 --out", "small"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("parent", ["file", "/proc", "/sys/class", "x" * 300])
def test_a_path_that_cannot_be_written_is_one_line(place, capsys, main, line, where, parent):
    path = f"{parent}/{where}"
    status = status_of(main, [*words(line), path])
    captured = capsys.readouterr()
    assert status == 1
    last = captured.err.splitlines()[-1]
    assert path in last
    assert any(step in last for step in ("choose another", "choose a shorter one", "give another"))
    assert not any(word in last for word in ("Errno", ".new", ".tmp", "Traceback"))
    assert "round 1" not in captured.out, "before any work"
    assert Path("file").read_text() == "mine"


def test_folders_that_lack_are_made(place, capsys, caplog):
    caplog.set_level("INFO")
    argv = f"{EMULATE} --out a/b/o.json --run-dir c/d/run --export e/f/model"
    assert coordinate(argv.split()) == 0
    assert on_device(words("keys --id a --keys g/h/keys")) == 0
    assert on_device(words("measure --save i/j/x.toml")) == 0
    assert on_device(words("infer e/f/model --data digits --out k/l/x.csv")) == 0
    assert on_device(words("infer-report e/f/model --data digits --out m/n/report")) == 0
    assert on_device(words("export e/f/model --exit 1 --out o/p/small")) == 0
    made = ["a/b/o.json", "c/d/run/run.sqlite", "e/f/model/model.json", "g/h/keys/device.public"]
    made += ["i/j/x.toml", "k/l/x.csv", "m/n/report/curve.csv", "o/p/small/model.json"]
    assert all(Path(path).exists() for path in made)
    for folder in ("a/b", "e/f", "i/j", "k/l", "o/p"):
        assert f"made the folder {folder}" in caplog.text


def test_a_folder_where_a_file_is_wanted_is_wrong_usage(place, capsys):
    for main, line in (
        (coordinate, f"{EMULATE} --out model"),
        (on_device, f"infer model {DATA} --out model"),
    ):
        assert status_of(main, words(line)) == 2
        assert "--out model is no file; give the name of one" in capsys.readouterr().err
