"""Writing a file whole, and locks: real kills, a real full disk, real processes."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.helpers import files
from edge_sdk.helpers.files import check_writable, heir_of, locked, mode_of, replacing, write_whole
from tests.support.examples import mode_of as mode
from tests.support.other_user import another_user, not_allowed_to_write
from tests.support.processes import ROOT

# Forks a writer that kills itself as its n-th call of anything outside Python begins or has ended:
# opening, locking, each write, syncing, renaming. Then another writes to the end. A line for each.
KILLED = """
import os, signal, sys
from pathlib import Path
from edge_sdk.helpers.files import write_whole

path, is_there = Path(sys.argv[1]), sys.argv[2] == "there"
OLD, NEW = b"old" * 100_000, b"new" * 90_000

def step(frame, event, called):
    global left
    if event in ("c_call", "c_return"):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

number, status = 0, -signal.SIGKILL
while status == -signal.SIGKILL:
    number += 1
    path.unlink(missing_ok=True)
    if is_there:
        path.write_bytes(OLD)
    writer = os.fork()
    if not writer:
        left = number
        sys.setprofile(step)
        write_whole(path, NEW, mode=0o640, owner_ids=(os.getuid(), os.getgid()))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])
    content = path.read_bytes() if path.exists() else b""
    found = {OLD: "old", NEW: "new", b"": "none"}.get(content, "mix")
    drafts = len(os.listdir(path.parent)) - path.exists()
    write_whole(path, b"next")
    assert path.read_bytes() == b"next"
    print(status, found, drafts, len(os.listdir(path.parent)) - 1)
"""


def python(code: str, *args: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, args)]


@pytest.mark.parametrize("before", ["there", "not there"])
def test_killed_between_any_two_steps_the_old_or_the_new_is_there(tmp_path, before):
    command = python(KILLED, tmp_path / "file", before)
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    *killed, last = [line.split() for line in ended.stdout.splitlines()]
    assert last == ["0", "new", "0", "0"]
    assert len(killed) > 30
    found = [content for _, content, _, _ in killed]
    old = "old" if before == "there" else "none"
    turn = found.index("new")
    assert found == [old] * turn + ["new"] * (len(found) - turn), "old until it is renamed"
    assert {status for status, *_ in killed} == {str(-signal.SIGKILL)}
    assert {drafts for _, _, drafts, _ in killed} == {"0", "1"}
    assert {later for *_, later in killed} == {"0"}, "the next writer removes what was left"


@pytest.mark.parametrize(
    ("umask", "wanted", "got"),
    [
        (0o027, None, 0o640),
        (0o000, None, 0o666),
        (0o000, 0o600, 0o600),
        (0o077, 0o644, 0o644),
    ],
)
def test_modes(tmp_path, umask, wanted, got):
    """Also of a draft that another mode was left to, and while it is written: never wider."""
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o604)
    path.with_name(".file.0.new").write_text("left")
    before = os.umask(umask)
    try:
        with replacing(path, mode=wanted) as file:
            assert mode(Path(file.name)) == got
            file.write(b"new")
    finally:
        os.umask(before)
    assert mode(path) == got
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_the_mode_of_the_old_file(tmp_path):
    path = tmp_path / "file"
    assert mode_of(path, 0o644) == 0o644
    path.touch()
    path.chmod(0o604)
    assert mode_of(path, 0o644) == 0o604


def test_text_is_utf_8(tmp_path):
    write_whole(tmp_path / "file", "é\n")
    assert (tmp_path / "file").read_bytes() == b"\xc3\xa9\n"


def test_an_error_meanwhile_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_two_writers_at_once_each_have_a_draft(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"first")
        second.write(b"the second")
        assert sorted(os.listdir(tmp_path)) == [".file.0.new", ".file.1.new"]
    assert path.read_bytes() == b"first", "it ended last"
    assert os.listdir(tmp_path) == ["file"]


def test_a_draft_that_is_taken_for_abandoned_before_it_is_locked(tmp_path, monkeypatch):
    """By one that looks between the two calls."""
    path, lock = tmp_path / "file", files.lock

    def late(handle: int) -> bool:
        monkeypatch.undo()
        path.with_name(".file.0.new").unlink()
        return lock(handle)

    monkeypatch.setattr(files, "lock", late)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to])
def test_another_file_is_never_written_through_a_link(tmp_path, plant):
    precious, path = tmp_path / "precious", tmp_path / "folder" / "file"
    precious.write_text("kept")
    path.parent.mkdir()
    for name in ("file", ".file.0.new"):
        plant(path.with_name(name), precious)
    write_whole(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert precious.read_text() == "kept"
    assert mode(precious) == 0o666 & ~umask()


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_link_that_is_put_there_meanwhile_is_not_followed(tmp_path, monkeypatch, link):
    """Between looking for a draft and making one, where root writes in another user's folder."""
    precious, path = tmp_path / "precious", tmp_path / "file"
    precious.write_text("kept")

    def plant(draft: Path) -> None:
        monkeypatch.undo()
        link(draft, precious)

    monkeypatch.setattr(files, "_remove_abandoned", plant)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert precious.read_text() == "kept"


def umask() -> int:
    now = os.umask(0o022)
    os.umask(now)
    return now


def test_a_pipe_under_the_drafts_name_stops_nothing(tmp_path):
    os.mkfifo(tmp_path / ".file.0.new")
    write_whole(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_of_another_user(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with not_allowed_to_write(tmp_path):
        for write in (lambda: write_whole(path, b"new"), lambda: check_writable(path)):
            with pytest.raises(PermissionError):
                write()
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_may_be_written_and_not_be_read(tmp_path):
    folder = tmp_path / "box"
    folder.mkdir()
    folder.chmod(0o733)
    with another_user(folder):
        write_whole(folder / "file", b"new")
    assert (folder / "file").read_bytes() == b"new"


@pytest.mark.parametrize("path", ["no/file", "plain/file", ".", "x" * 300])
def test_a_path_that_cannot_be_written_is_an_os_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").touch()
    with pytest.raises(OSError):
        write_whole(Path(path), b"new")
    assert os.listdir(tmp_path) == ["plain"]


def test_looking_whether_it_can_be_written_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("old")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "other")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.root
def test_a_full_disk_leaves_the_old_file_and_no_draft(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tiny tmpfs cannot be mounted: needs root")
    try:
        path = tmp_path / "file"
        write_whole(path, b"old")
        with pytest.raises(OSError) as caught:
            write_whole(path, bytes(100_000))
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize(("is_synced", "expected"), [(True, ["draft", "folder"]), (False, [])])
def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch, is_synced, expected):
    path, synced, real = tmp_path / "file", [], os.fsync

    def fsync(handle: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        assert path.exists() == is_folder
        assert is_folder or os.fstat(handle).st_size == 3
        synced.append("folder" if is_folder else "draft")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(path, b"new", is_synced=is_synced)
    assert synced == expected


@pytest.mark.parametrize(("number", "is_error"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, number, is_error):
    """EINVAL: its file system has no such thing. EIO: it may be lost."""

    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if is_error:
        with pytest.raises(OSError, match="Input/output error"):
            files.sync(tmp_path)
    else:
        files.sync(tmp_path)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root rights")
def test_what_root_writes_belongs_to_the_owner_of_the_file_or_else_of_the_folder(tmp_path):
    path = tmp_path / "file"
    os.chown(tmp_path, 4711, 4712)
    write_whole(path, b"new", owner_ids=heir_of(path))
    assert (path.stat().st_uid, path.stat().st_gid) == (4711, 4712)
    os.chown(path, 4713, 4714)
    write_whole(path, b"newer", owner_ids=heir_of(path))
    assert (path.stat().st_uid, path.stat().st_gid) == (4713, 4714)
    with another_user(tmp_path):
        assert heir_of(path) is None


HOLDS = """
import sys
from pathlib import Path
from edge_sdk.helpers.files import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_excludes_another_process_until_that_is_killed(tmp_path):
    folder = tmp_path / "made" / "here"
    command = python(HOLDS, folder)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        try:
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(BlockingIOError), locked(folder, is_patient=False):
                pass
        finally:
            holder.kill()
    with locked(folder), pytest.raises(BlockingIOError), locked(folder, is_patient=False):
        pass
    with locked(folder, is_patient=False):
        pass


def test_it_imports_next_to_nothing():
    code = (
        "import sys, edge_sdk.helpers.files; "
        "print(*{'msgspec', 'numpy', 'torch', 'edge_sdk.protocol.messages'} & set(sys.modules))"
    )
    ended = subprocess.run(python(code), capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.split() == []
