"""What a user meets who may not do everything; root has to become one for it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def another_user(near: Path) -> Iterator[None]:
    """Nobody, if this is root; the folders above `near` may be searched meanwhile."""
    above = [parent for parent in near.resolve().parents if parent.stat().st_uid == os.getuid()]
    opened = {parent: parent.stat().st_mode for parent in above if not parent.stat().st_mode & 0o5}
    for parent, mode in opened.items():
        parent.chmod(stat.S_IMODE(mode) | 0o055)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path, mode in opened.items():
            path.chmod(stat.S_IMODE(mode))


@contextlib.contextmanager
def not_allowed_to_write(folder: Path) -> Iterator[None]:
    """As another user, who may read all of it."""
    mode = folder.stat().st_mode
    for file in folder.iterdir():
        file.chmod(0o644 if file.is_file() else 0o755)
    folder.chmod(0o555)
    try:
        with another_user(folder):
            yield
    finally:
        folder.chmod(stat.S_IMODE(mode))


@contextlib.contextmanager
def closed(path: Path) -> Iterator[None]:
    """A file or folder of mode 000, for another user."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with another_user(path):
            yield
    finally:
        path.chmod(stat.S_IMODE(mode))
