"""The systemd service: its unit as text, the files of an installation, and what systemctl says.

`root` is "/" or, for images and tests, a folder that will be one; then systemctl is never called.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_sdk.agent.settings import DEFAULT_CONFIG, Settings, read_config, template
from edge_sdk.agent.watchdog import WATCHDOG_S
from edge_sdk.errors import ConfigError
from edge_sdk.hardware.procfs import read_text
from edge_sdk.helpers.files import why_not, write_whole

ROOT = Path("/")
NAME = "edge-sdk"
UNIT = Path(f"/etc/systemd/system/{NAME}.service")
WANTS = Path(f"/etc/systemd/system/multi-user.target.wants/{NAME}.service")
STATE = Path(f"/var/lib/{NAME}")
# With DynamicUser the first is a link to the second.
STATE_FOLDERS = (STATE, Path(f"/var/lib/private/{NAME}"))
CACHE_FOLDERS = (Path(f"/var/cache/{NAME}"), Path(f"/var/cache/private/{NAME}"))
AGENT_BYTES = 64 * 1024**2  # beside the trainer; it takes 31 MB
SHARE = "80%"  # of the machine's memory, where the config has no cap
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # by ProtectHome and PrivateTmp
GPU_GROUPS = ("video", "render")  # own a Jetson's and a desktop GPU's device files
STEPS_VERSION = 254  # of systemd, that knows RestartSteps
GROWING = "RestartSec=5s\nRestartSteps=6\nRestartMaxDelaySec=5min"
CONSTANT = "RestartSec=30s"


def unit_text(
    settings: Settings,
    command: Sequence[str],
    config: Path,
    *,
    systemd_version: int = 0,
    groups: Sequence[str] = (),
) -> str:
    """The unit. command: runs edge-sdk; groups: those that exist here; version 0: not known."""
    is_gpu = (settings.device or "cpu") != "cpu"
    joined = [group for group in groups if is_gpu or group not in GPU_GROUPS]
    # Before systemd 253 ProtectClock allows the clock's device files only: it would hide the GPU's.
    devices = [] if is_gpu else ["PrivateDevices=yes", "DevicePolicy=closed", "ProtectClock=yes"]
    devices.append(f"SupplementaryGroups={' '.join(joined)}" if joined else "PrivateUsers=yes")
    cap = settings.cap_bytes
    values = {
        "COMMAND": " ".join(map(quoted, command)),
        "CONFIG": quoted(str(config)),
        "WATCHDOG_S": str(WATCHDOG_S),
        "RESTART": GROWING if systemd_version >= STEPS_VERSION else CONSTANT,
        "MEMORY_MAX": SHARE if cap is None else str(cap + AGENT_BYTES),
        "DEVICES": "\n".join(devices),
    }
    text = Path(__file__).with_name("edge-sdk.service.in").read_text(encoding="utf-8")
    return re.sub("@([A-Z_]+)@", lambda found: values[found[1]], text)


def quoted(word: str) -> str:
    """A word for ExecStart, in which systemd sees no specifier, no variable and no second word."""
    word = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$").replace('"', '\\"')
    return f'"{word}"' if re.search(r"[\s\"'\\;]", word) else word


def own_command(root: Path = ROOT) -> list[str]:
    """How this very installation is started, as seen from `root`."""
    script = Path(sys.executable).parent / NAME
    called = Path(shutil.which(sys.argv[0]) or sys.argv[0])
    if called.name == NAME and called.is_file():
        script = called.absolute()
    command = [str(script)] if script.is_file() else [sys.executable, "-m", "edge_sdk.cli"]
    inside = f"{root}/" if root != ROOT else "/"
    return [
        f"/{word.removeprefix(inside)}" if word.startswith(inside) else word for word in command
    ]


def hidden_program() -> str:
    """Why a service could not start this installation; "" when it could."""
    for path in (own_command()[0], sys.executable, os.path.realpath(sys.executable)):
        if is_hidden(path):
            return (
                f"this edge-sdk runs from {path}, and a service does not see {', '.join(HIDDEN)}; "
                f"install it elsewhere: sudo python3 -m venv /opt/{NAME}, then "
                f"sudo /opt/{NAME}/bin/pip install what {NAME} was installed from here"
            )
    return ""


def is_hidden(path: str) -> bool:
    """Whether the service cannot see this path."""
    return any(path == folder or path.startswith(f"{folder}/") for folder in HIDDEN)


def check_visible(settings: Settings, config: Path) -> None:
    """Raises ConfigError when the config, or a path in it, is hidden from the service."""
    if is_hidden(str(config)):
        raise ConfigError(
            f"the service does not see {config}, as it is under {', '.join(HIDDEN)}; move it to "
            f"{DEFAULT_CONFIG.parent}"
        )
    for key in ("data", "keys", "server_key"):
        path = getattr(settings, key) or ""
        if is_hidden(path):
            raise ConfigError(
                f"{config}, key {key}: the service does not see {path}, as it is under "
                f"{', '.join(HIDDEN)}; move it to {STATE} or /srv"
            )


def install(root: Path, unit: str) -> None:
    """Write unit and enable it; on the running system by systemctl. Raises ConfigError."""
    try:
        write(under(root, UNIT), unit)
        if root != ROOT:
            link = under(root, WANTS)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(UNIT)
            return
    except OSError as error:
        raise ConfigError(f"the unit cannot be installed: {error}") from error
    systemctl("daemon-reload")
    systemctl("enable", "--quiet", NAME)


def ensure_config(root: Path, config: Path) -> tuple[Settings, bool]:
    """The settings of the config file and whether it was written just now. A file that is there is
    never changed. Raises ConfigError."""
    path = under(root, config)
    is_new = not path.exists()
    if is_new:
        try:
            write(path, template())
        except OSError as error:
            raise ConfigError(f"config file {path} cannot be written: {why_not(error)}") from error
    return read_config(path), is_new


def remove(root: Path, *, with_state: bool) -> list[Path]:
    """Stop, disable and delete the unit; with_state: also config, keys, cache. What is gone."""
    unit = under(root, UNIT)
    if root == ROOT and unit.exists():
        systemctl("disable", "--now", "--quiet", NAME)
    doomed = [unit, under(root, WANTS)]
    if with_state:
        doomed += [under(root, path) for path in (*STATE_FOLDERS, *CACHE_FOLDERS, DEFAULT_CONFIG)]
    gone = [path for path in doomed if path.is_symlink() or path.exists()]
    try:
        for path in gone:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot be removed: {error}") from error
    if root == ROOT:
        systemctl("daemon-reload")
    return gone


def under(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def write(path: Path, text: str) -> None:
    """Whole or not at all, readable by everyone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text, mode=0o644)


def systemctl(*words: str) -> str:
    """What systemctl prints. Raises ConfigError with its last line when it fails."""
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"systemctl cannot be run: {error}; is systemd installed?") from error
    if done.returncode:
        last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise ConfigError(f"systemctl {' '.join(words)}: {last}")
    return done.stdout


def systemd_version() -> int:
    """The version of systemd; 0: there is none, or it does not say."""
    try:
        found = re.match(r"systemd (\d+)", systemctl("--version"))
    except ConfigError:
        return 0
    return int(found[1]) if found else 0


def check_running_systemd() -> None:
    """Raises ConfigError where systemd does not run this machine."""
    if not Path("/run/systemd/system").is_dir():
        step = "use `edge-sdk run`, or --root DIR to write the service into a system's folder"
        raise ConfigError(f"this machine is not run by systemd; {step}")


def shown(properties: str) -> dict[str, str]:
    """Properties of the service, named with commas between. Raises ConfigError."""
    lines = systemctl("show", NAME, f"--property={properties}").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def existing_groups(root: Path = ROOT) -> list[str]:
    """The groups of this system that a service may need: the GPU's, and that of jetson-stats."""
    known = {line.partition(":")[0] for line in read_text(root / "etc/group").splitlines()}
    return [group for group in (*GPU_GROUPS, "jtop") if group in known]
