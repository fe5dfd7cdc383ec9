"""What a failure to write is called."""

from __future__ import annotations

import errno
import os
import resource
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from coordinator.store.lock import writing
from edge_sdk.errors import StoreError


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_no_full_disk(number):
    with (
        pytest.raises(StoreError, match="Too many open files.*ulimit -Hn") as caught,
        writing(Path("run.sqlite")),
    ):
        raise OSError(number, os.strerror(number))
    assert "free space" not in str(caught.value)


def test_a_full_disk_is_one():
    with pytest.raises(StoreError, match="free space"), writing(Path("run.sqlite")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_waits_for_a_descriptor_that_others_give_back(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = os.open(os.devnull, os.O_RDONLY)
    taken = [first]
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + 8, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        giving = threading.Timer(0.05, lambda: [os.close(number) for number in taken])
        giving.start()
        with writing(tmp_path / "file"):
            (tmp_path / "file").write_text("kept")
        giving.join()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "file").read_text() == "kept"
