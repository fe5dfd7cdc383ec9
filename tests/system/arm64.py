"""A small ARM64 system on this machine: Debian's packages and PyPI's wheels for aarch64, run by
QEMU's user mode as the CPU of a Raspberry Pi 4. It tests instruction set and packaging, no speed.

What is downloaded stays in a cache outside the checkout, by what it consists of. Nothing of this
machine changes: mounts, processes and the handler for foreign programs live in namespaces.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.processes import ROOT

CPU = "cortex-a72"  # of a Raspberry Pi 4: ARMv8.0, no LSE atomics, no SVE
SUITE, PYTHON = "bookworm", "3.11"
QEMU_SUITE = "trixie"  # 10.0; 7.2 of bookworm dies in onnxruntime 1.28 and later
PACKAGES = "python3,python3-venv,libgomp1,libstdc++6,dash,coreutils,ca-certificates"
# Wheels with what they depend on: pip evaluates markers for this machine, not for the other.
WHEELS = (
    "pip==26.3",
    "numpy==2.4.6",
    "pyzmq==27.3.0",
    "msgpack==1.2.4",
    "msgspec==0.22.0",
    "psutil==7.2.2",
    "onnxruntime==1.31.1",
    "protobuf==7.36.2",
    "flatbuffers==25.12.19",
    "packaging==26.3",
)
TORCH = (
    "torch==2.9.1",
    "filelock==4.2.11",
    "typing_extensions==4.16.0",
    "sympy==1.14.0",
    "mpmath==1.3.0",
    "networkx==3.6.1",
    "jinja2==3.1.6",
    "markupsafe==3.0.4",
    "fsspec==2026.9.0",
)
BUILD = ("hatchling==1.27.0",)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux2014")
SITE = f"usr/local/lib/python{PYTHON}/dist-packages"
TORCH_SITE = "usr/local/lib/torch"  # apart, so that a device without it is the same root
VENV = "/srv/session/venv"  # of the emulated system, with the package in it
BUILD_S = 900.0
NAMESPACES = ("--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child")
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "apt-get": "apt",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "chroot": "coreutils",
}


class CannotBuild(Exception):
    """No network, no mirror: what is missing here, not what is wrong with the package."""


def lacks() -> str:
    """What is missing for such a system here; "" when nothing is."""
    if os.geteuid() != 0:
        return "needs root"
    if platform.machine() != "x86_64":
        return f"needs an x86_64 machine, this is {platform.machine()}"
    for tool, package in TOOLS.items():
        if not shutil.which(tool):
            return f"needs {tool}: apt-get install {package}"
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    if release is None or (int(release[1]), int(release[2])) < (6, 7):
        found = platform.release()
        return f"needs Linux 6.7 or later, for a binfmt_misc of its own; this is {found}"
    mount = "mount -t proc p /proc && mount -t binfmt_misc none /proc/sys/fs/binfmt_misc"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "sh", "-c", mount], capture_output=True, text=True, check=False
    )
    return "" if tried.returncode == 0 else f"may not mount binfmt_misc: {tried.stderr.strip()}"


def cached() -> Path:
    """The folder with `root`, `qemu-aarch64` and `build`, made now if need be.

    Raises CannotBuild where something cannot be downloaded."""
    parts = (SUITE, QEMU_SUITE, PACKAGES, *WHEELS, *TORCH, *BUILD, *sys.version_info[:2])
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "edge-sdk-tests" / f"arm64-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as name:
        made = Path(name) / "made"
        _make(made)
        with contextlib.suppress(OSError):  # another test run was faster
            made.rename(folder)
    return folder


def _make(folder: Path) -> None:
    """Three downloads at once, then put together."""
    mirror = _mirror()
    wheels = folder / "wheels"
    folder.mkdir()
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(
                _run,
                "mmdebstrap",
                "--arch=arm64",
                "--variant=extract",
                f"--include={PACKAGES}",
                SUITE,
                str(folder / "root"),
                mirror,
            ),
            pool.submit(
                _run,
                "mmdebstrap",
                "--variant=extract",
                "--include=qemu-user",
                QEMU_SUITE,
                str(folder / "qemu"),
                mirror,
            ),
            pool.submit(_fetch, wheels),
        ]
        for job in jobs:
            job.result()
    (folder / "qemu/usr/bin/qemu-aarch64").rename(folder / "qemu-aarch64")
    root = folder / "root"
    for made, part in ((wheels / "base", SITE), (wheels / "torch", TORCH_SITE)):
        shutil.copytree(made, root / part, dirs_exist_ok=True, copy_function=shutil.move)
    (wheels / "build").rename(folder / "build")
    for name in ("proc", "dev", "sys", "srv", "tmp", "root"):
        (root / name).mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")  # no package is configured
    shutil.rmtree(folder / "qemu")
    shutil.rmtree(wheels)


def _fetch(folder: Path) -> None:
    """Wheels for the other machine, and what builds ours on this one. pip compiles them with this
    Python, which the other's takes where it is the same version: faster than under emulation."""
    other = [part for name in PLATFORMS for part in ("--platform", f"{name}_aarch64")]
    other += ["--python-version", PYTHON, "--only-binary=:all:", "--no-deps"]
    for name, wanted, flags in (
        ("base", WHEELS, other),
        ("torch", TORCH, other),
        ("build", BUILD, []),
    ):
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-conflicts")
        _run(*pip, *flags, "--target", str(folder / name), *wanted)


def _mirror() -> str:
    """Where this machine's own apt gets Debian from."""
    listed = _run(
        "apt-get",
        "indextargets",
        "--format",
        "$(ORIGIN) $(COMPONENT) $(SUITE) $(SITE) $(REPO_URI)",
        "Created-By: Packages",
    )
    for line in listed.splitlines():
        origin, component, *rest = line.split()
        if (origin, component) == ("Debian", "main") and "security" not in line:
            return rest[-1]
    raise CannotBuild("apt knows no Debian mirror here; run apt-get update")


def _run(*command: str) -> str:
    """Its output. Raises CannotBuild with the last line of what went wrong."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=BUILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CannotBuild(f"{command[0]} took more than {BUILD_S:g} s") from error
    if done.returncode:
        lines = (done.stderr.strip() or f"status {done.returncode}").splitlines()
        raise CannotBuild(f"{' '.join(command[:3])}: {lines[-1]}")
    return done.stdout


class Arm:
    """The system with this source tree's package installed; `session` is its /srv/session."""

    def __init__(self, session: Path) -> None:
        self.session = session
        self._cache = cached()
        self._install()

    def command(self, *words: str, torch: bool = False) -> list[str]:
        """Those words as a command of this machine, which ends with the process that starts it."""
        path = f"PYTHONPATH=/{TORCH_SITE}" if torch else "PYTHONPATH="
        return [
            "setpriv",
            "--pdeathsig=KILL",
            "unshare",
            *NAMESPACES,
            "bash",
            str(ROOT / "tests/system/enter_arm64.sh"),
            str(self._cache / "root"),
            str(self._cache / "qemu-aarch64"),
            CPU,
            str(self.session),
            path,
            *words,
        ]

    def run(self, *words: str, torch: bool = False, timeout_s: float = 600.0) -> str:
        """Its output; an AssertionError with all that it said if it fails."""
        done = subprocess.run(
            self.command(*words, torch=torch),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _install(self) -> None:
        """As on a Jetson: a venv that sees the system's packages, then pip."""
        wheels = self.session / "wheels"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "--quiet",
                "--no-deps",
                "--no-build-isolation",
                "--no-index",
                "--wheel-dir",
                str(wheels),
                str(ROOT),
            ],
            env=os.environ | {"PYTHONPATH": str(self._cache / "build")},
            check=True,
            timeout=BUILD_S,
        )
        (wheel,) = wheels.glob("edge_sdk-*.whl")
        self.run("python3", "-m", "venv", "--system-site-packages", "--without-pip", VENV)
        self.installed = self.run(
            f"{VENV}/bin/python",
            "-m",
            "pip",
            "install",
            "--no-index",
            f"/srv/session/wheels/{wheel.name}[torch,infer]",
            torch=True,
        )
