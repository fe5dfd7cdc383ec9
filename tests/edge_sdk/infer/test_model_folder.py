"""The exported model's folder: paths that cannot be used, and replacing one as a whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.cli.main import main
from edge_sdk.errors import StoreError
from edge_sdk.helpers.files import write_file
from edge_sdk.infer import model_folder
from edge_sdk.infer.export import export
from edge_sdk.infer.model_folder import check_target, new_folder, read_model, read_thresholds
from tests.support.examples import two_exits
from tests.support.other_user import not_allowed_to_write

TOO_LONG = "x" * 300  # of no file system's names: even root cannot look at it


@pytest.fixture
def model(tmp_path):
    export(*two_exits(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["file/p.csv", TOO_LONG, "."])
def test_a_path_that_cannot_be_written_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError) as refused:
        write_file(tmp_path / name, b"new")
    assert str(refused.value).startswith(f"{tmp_path / name} cannot be written: ")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_current_folder_is_no_file_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=r"^\. cannot be written"):
        write_file(Path("."), b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_made_and_told(model, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    np.save(tmp_path / "x.npy", np.zeros((1, 2), np.float32))
    out = tmp_path / "nodir" / "p.csv"
    command = ["infer", str(model), "--data", str(tmp_path / "x.npy"), "--out", str(out)]
    assert main(command) == 0
    assert out.read_text().startswith("index,label,exit,confidence\n0,")
    assert f"made the folder {out.parent}" in caplog.text


def test_a_folder_of_another_user_is_not_said_to_be_full(tmp_path):
    with (
        not_allowed_to_write(tmp_path),
        pytest.raises(StoreError, match="Permission denied; give this user the right to"),
    ):
        write_file(tmp_path / "p.csv", b"new")


def test_a_read_only_disk_is_one_line(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(StoreError, match="Read-only file system"):
        write_file(tmp_path / "p.csv", b"new")


@pytest.mark.parametrize(
    "read",
    [
        read_model,
        check_target,
        lambda folder: read_thresholds(folder, None),
        lambda folder: new_folder(folder).__enter__(),
    ],
    ids=["model", "target", "calibration", "new"],
)
def test_a_folder_that_cannot_be_looked_at_is_one_line(tmp_path, read):
    with pytest.raises(StoreError) as refused:
        read(tmp_path / TOO_LONG)
    assert "cannot be looked at: File name too long; give another path" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder; see TOO_LONG for root")
def test_a_folder_without_permission_is_one_line(model):
    model.chmod(0)
    try:
        for read in (read_model, lambda folder: read_thresholds(folder, None)):
            with pytest.raises(StoreError, match="cannot be looked at: Permission denied"):
                read(model)
        with pytest.raises(StoreError, match="is no folder that can be read"):
            check_target(model)
    finally:
        model.chmod(0o700)


def test_a_link_that_leads_to_itself_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match="symbolic links"), new_folder(tmp_path / "loop"):
        pass


def test_the_commands_say_so_in_one_line(model, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((1, 2), np.float32))
    long, x, below = (str(tmp_path / name) for name in (TOO_LONG, "x.npy", "x.npy/p.csv"))
    for command in (
        ["infer", str(model), "--data", x, "--out", below],
        ["infer", long, "--data", x],
        ["export", long, "--out", str(tmp_path / "new")],
        ["export", str(model), "--exit", "1", "--out", long],
        ["export", str(model), "--exit", "1", "--out", below],
    ):
        assert main(command) == 1
        err = capsys.readouterr().err
        assert err.startswith("edge-sdk: ")
        assert err.count("\n") == 1


# -- replacing a folder ------------------------------------------------------------------------


def contents(folder):
    """Of all that lies there, whatever its name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_replacement_that_cannot_take_its_place_changes_nothing(model, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(StoreError, match="cannot be written"), new_folder(model) as draft:
        draft.rmdir()
    assert contents(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_interrupted_between_the_renames_it_changes_nothing(model, tmp_path, monkeypatch):
    before, rename = contents(tmp_path), os.rename

    def interrupted(source, target):
        rename(source, target)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(model_folder.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(model):
        pass
    assert contents(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_cannot_be_brought_back_is_not_deleted(model, tmp_path, monkeypatch):
    before, rename = contents(tmp_path), os.rename

    def broken(source, target):
        if Path(target) == model:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(model_folder.os, "rename", broken)
    with pytest.raises(StoreError, match="Input/output error"), new_folder(model):
        pass
    assert contents(tmp_path / f".model.{os.getpid()}.old") == before


def test_a_first_export_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(StoreError), new_folder(tmp_path / "model") as draft:
        draft.rmdir()
    assert list(tmp_path.iterdir()) == []
