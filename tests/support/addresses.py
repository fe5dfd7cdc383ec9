"""What of IPv6 this machine has, and machines that have none of it."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no address ::1")
# Run before a program: the kernel then answers it as one without IPv6 does (seccomp).
NO_IPV6 = """
import ctypes, errno, platform, socket, struct
number = {"x86_64": 41, "aarch64": 198}[platform.machine()]  # of socket()
load, if_equal, answer = 0x20, 0x15, 0x06
steps = [
    (load, 0, 0, 0),
    (if_equal, 0, 3, number),
    (load, 0, 0, 16),  # its first argument
    (if_equal, 0, 1, socket.AF_INET6),
    (answer, 0, 0, 0x00050000 | errno.EAFNOSUPPORT),
    (answer, 0, 0, 0x7FFF0000),  # allowed
]
steps = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("@HP", 6, ctypes.addressof(steps)))
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, program), ctypes.get_errno()
try:
    socket.socket(socket.AF_INET6)
except OSError as error:
    assert error.errno == errno.EAFNOSUPPORT
"""
KERNELS = ("without the family", "switched off")


def printed_without_ipv6(program: str, kernel: str) -> list[str]:
    """The lines that a Python program prints on a machine without IPv6: of a kernel that does not
    know it, or with all its addresses switched off, which takes root."""
    command = [sys.executable, "-c", program]
    if kernel == "switched off":
        if os.geteuid():
            pytest.skip("switching IPv6 off needs root rights")
        off = "ip link set lo up && echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"
        command = ["unshare", "-n", "sh", "-c", f'{off} && exec "$@"', "sh", *command]
    elif platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip(f"no number of socket() is known for {platform.machine()}")
    else:
        command[-1] = f"{NO_IPV6}\n{program}"
    return _lines(command)


def printed_with_hosts(program: str, hosts: str, folder: Path) -> list[str]:
    """The lines that a Python program prints on a machine with this /etc/hosts. Needs root."""
    (folder / "hosts").write_text(hosts)
    bind = f"mount --bind {folder}/hosts /etc/hosts"
    python = [sys.executable, "-c", program]
    return _lines(["unshare", "-m", "sh", "-c", f'{bind} && exec "$@"', "sh", *python])


def _lines(command: list[str]) -> list[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
