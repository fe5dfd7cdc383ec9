"""A small machine that a real systemd runs, in namespaces of this one: process 1, cgroups with real
limits, an own network. It boots in about a second and leaves nothing behind.

/usr is this machine's own, so nothing is downloaded; /etc, /var and the rest are new (boot.sh).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.support.processes import ROOT, wait_until

CGROUPS = Path("/sys/fs/cgroup")
CONTROLLERS = {"memory", "cpu", "cpuacct", "pids", "devices", "freezer", "blkio"}
BOOT_S = 60.0
PYTHON = Path("/usr/bin/python3")
PREFIX = Path("/opt/edge-sdk")  # where the package is installed inside


def lacks() -> str:
    """What is missing for such a machine here; "" when nothing is."""
    if os.geteuid() != 0:
        return "needs root"
    for tool in ("unshare", "nsenter", "setpriv", "ip", "pivot_root"):
        if not shutil.which(tool):
            return f"needs {tool}"
    if not Path("/lib/systemd/systemd").exists():
        return "needs systemd: apt-get install systemd"
    if not Path("/lib").is_symlink():
        return "needs a merged /usr"
    if missing := CONTROLLERS - set(_own_groups()):
        return f"needs the controllers {', '.join(sorted(missing))} of cgroup version 1"
    if not PYTHON.exists():
        return f"needs {PYTHON}: apt-get install python3"
    version = subprocess.run([PYTHON, "-V"], capture_output=True, text=True, check=True).stdout
    if version.split()[1].split(".")[:2] != list(map(str, sys.version_info[:2])):
        return f"needs a {PYTHON} of this Python's version, for its packages; it is {version}"
    tried = subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], check=False)
    return "" if tried.returncode == 0 else "may not make namespaces here"


class Machine:
    """Booted as a context manager. run() is a command of its root."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._groups = [group / f"edge-sdk-test-{os.getpid()}" for group in _own_groups().values()]
        self._boot: subprocess.Popen[bytes] | None = None
        self.pid = 0  # of its process 1, seen from here

    def __enter__(self) -> Machine:
        for group in self._groups:
            group.mkdir()
        root = self._folder / "root"
        root.mkdir()
        join = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs"; shift; done; shift; exec "$@"'
        namespaces = ("--cgroup", "--mount", "--pid", "--uts", "--ipc", "--net")
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        with (self._folder / "boot.log").open("wb") as log:
            self._boot = subprocess.Popen(
                [
                    "sh",
                    "-c",
                    join,
                    "sh",
                    *map(str, self._groups),
                    "--",
                    "setpriv",
                    "--pdeathsig=KILL",  # the machine ends with this process
                    "unshare",
                    *namespaces,
                    "--fork",
                    "--kill-child",
                    "bash",
                    str(ROOT / "tests/system/boot.sh"),
                    str(root),
                    packages,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(self._has_booted, "systemd has booted", BOOT_S)
            self._install_package()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._boot is not None
        for process in psutil.Process(self._boot.pid).children():
            process.kill()  # process 1 takes all others with it
        self._boot.kill()
        self._boot.wait(30)
        for group in self._groups:
            for folder in [*sorted(group.rglob("*/"), reverse=True), group]:
                if folder.is_dir():
                    _remove_group(folder)

    def path(self, inside: str | Path) -> Path:
        """A file of the machine as seen from here."""
        return Path(f"/proc/{self.pid}/root/{str(inside).lstrip('/')}")

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [
                "nsenter",
                "--target",
                str(self.pid),
                "--mount",
                "--uts",
                "--ipc",
                "--net",
                "--pid",
                "--cgroup",
                "env",
                "-i",
                "PATH=/usr/sbin:/usr/bin",
                "HOME=/root",
                *command,
            ],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done

    def edge_sdk(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(f"{PREFIX}/bin/edge-sdk", *words, check=check)

    def processes(self, words: str) -> list[psutil.Process]:
        """Those with these words in their command line."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def in_its_network(self, *command: str) -> list[str]:
        """A command of this machine that shares only the other's network."""
        return ["nsenter", "--target", str(self.pid), "--net", *command]

    def _has_booted(self) -> bool:
        assert self._boot is not None
        log = (self._folder / "boot.log").read_text()
        assert self._boot.poll() is None, f"the machine ended:\n{log}"
        found = [p for p in psutil.Process(self._boot.pid).children() if p.name() == "systemd"]
        if not found:
            return False
        self.pid = found[0].pid
        time.sleep(0.1)  # its manager answers once it has its socket
        return self.run("systemctl", "is-active", "basic.target", check=False).returncode == 0

    def _install_package(self) -> None:
        """The package as pip would put it into a virtual environment of /usr/bin/python3; what it
        needs comes from the packages of this test's Python."""
        prefix = self.path(PREFIX)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        site = prefix / "lib" / version / "site-packages"
        (prefix / "bin").mkdir(parents=True)
        (prefix / "pyvenv.cfg").write_text("home = /usr/bin\n")
        (prefix / "bin" / "python3").symlink_to(PYTHON)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "edge_sdk", site / "edge_sdk", ignore=ignored)
        shutil.copytree(ROOT / "profiles", site / "edge_sdk" / "profiles")
        (site / "packages.pth").write_text("/opt/packages\n")
        script = prefix / "bin" / "edge-sdk"
        script.write_text(
            f"#!{PREFIX}/bin/python3\nimport sys\nfrom edge_sdk.cli.__main__ import main\n"
            "sys.exit(main())\n"
        )
        script.chmod(0o755)


def _own_groups() -> dict[str, Path]:
    """This process's group in each hierarchy of cgroup version 1 and the one of version 2 beside
    them, by controller."""
    groups = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in (names or "unified").removeprefix("name=").split(","):
            folder = CGROUPS / name / path.lstrip("/")
            if name != "cpuset" and folder.is_dir():  # a new cpuset takes no process
                groups[name] = folder
    return groups


def _remove_group(folder: Path) -> None:
    """Its last processes may be ending."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.1)
