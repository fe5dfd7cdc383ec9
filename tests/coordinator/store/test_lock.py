"""What a failure to write is called."""

from __future__ import annotations

import errno
import os
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
