"""`edge-sdk doctor`: everything that a device trips over, found before it does, with what to do.

Each check is a small function that returns a Finding and raises nothing; `root` is "/" but in
tests. Torch is never imported here: another process is asked, as on a CPU that lacks instructions
which torch was built for it dies of SIGILL (torch 2.10 on a Raspberry Pi 4)."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from edge_sdk.agent.settings import DEFAULT_CONFIG, Settings, read_config
from edge_sdk.capacity.costs import TRAINER_ENVIRONMENT
from edge_sdk.cli.systemd_unit import STATE, is_hidden
from edge_sdk.errors import ConfigError, EdgeError
from edge_sdk.hardware import conditions
from edge_sdk.hardware.boards import board_name
from edge_sdk.hardware.jetson import jetson_stats
from edge_sdk.hardware.limits import memory
from edge_sdk.hardware.procfs import ROOT, read_text
from edge_sdk.helpers.imports import INSTALL, install, is_too_old, oldest
from edge_sdk.helpers.text import mebibytes
from edge_sdk.protocol.keys import DEVICE_KEYS, KeyPair, read_all_keys

EARLIEST = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)  # this program is younger
LEAST_MEMORY = 350 * 1024**2  # torch's 250 MB, the agent's 31 and a small model
LEAST_DISK = 100 * 1024**2
CONNECT_S = 5.0
TORCH_S = 180.0  # a cold start from a slow SD card takes a minute
TORCH_PROBE = """
import json, numpy, torch
torch.from_numpy(numpy.ones(1))  # fails where torch was built for another numpy
layer = torch.nn.Conv2d(3, 8, 3)
layer(torch.ones(2, 3, 8, 8)).sum().backward()
try:
    capability = torch.backends.cpu.get_cpu_capability()
except AttributeError:
    capability = "unknown"
print(json.dumps([torch.__version__, capability, torch.cuda.is_available()]))
"""
JETPACKS = {"32": "4", "34": "5", "35": "5", "36": "6"}  # by release of Jetson Linux


class Finding(msgspec.Struct, frozen=True):
    """What one check found; advice: what to do, "" when all is well."""

    name: str
    outcome: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(config: Path | None, default_keys: Path) -> Iterator[Finding]:
    """What each check finds, as it is done. config None: the service's file if there is one."""
    yield check_system()
    yield check_python()
    settings, finding = check_config(config)
    yield finding
    yield check_torch(settings.device or "cpu")
    yield check_memory(settings.cap_bytes)
    yield check_memory_group()
    yield check_clock(datetime.datetime.now(datetime.timezone.utc))
    yield check_disk(STATE if os.path.exists(STATE) else default_keys)
    yield check_jetson()
    yield check_conditions()
    is_service = config in (None, DEFAULT_CONFIG) and DEFAULT_CONFIG.exists()
    yield check_data(settings.data, is_service=is_service)
    folder = Path(settings.keys) if settings.keys else default_keys
    keys, finding = check_keys(folder, settings.server_key, is_insecure=bool(settings.insecure))
    yield finding
    yield check_coordinator(settings.coordinator, keys, is_insecure=bool(settings.insecure))


# -- the machine ----------------------------------------------------------------------------------


def check_system(machine: str = "", bits: int = 0) -> Finding:
    machine, bits = machine or platform.machine(), bits or sys.maxsize.bit_length() + 1
    found = f"{platform.system()}, {machine}, {bits} bits"
    if bits == 64:
        return Finding("system", "ok", found)
    advice = "there is no torch for 32 bits; install the 64-bit image of the board's system"
    return Finding("system", "fail", found, advice)


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    found = ".".join(map(str, version))
    if version >= (3, 10):
        return Finding("python", "ok", found)
    return Finding("python", "fail", found, "Python 3.10 or later is needed")


def check_torch(device: str = "cpu", probe: str = TORCH_PROBE) -> Finding:
    """Whether torch computes a convolution, tried in another process."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe],
            env=os.environ | TRAINER_ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=TORCH_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("torch", "fail", str(error), "is the disk failing, or memory too small?")
    if done.returncode == -signal.SIGILL:
        return Finding(
            "torch",
            "fail",
            "it dies of an illegal instruction (SIGILL): not built for this CPU",
            "install a version that is: pip install 'torch>=2.8,<2.10' (2.10 needs ARMv8.1, a "
            "Raspberry Pi 4 is ARMv8.0)",
        )
    if done.returncode:
        last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        if done.returncode == -signal.SIGKILL:
            last = "killed by signal 9, most likely for memory"
        return Finding("torch", "fail", last, f"{INSTALL}; edge-sdk infer works without")
    version, capability, has_cuda = json.loads(done.stdout.splitlines()[-1])
    if is_too_old(version):
        return Finding("torch", "fail", f"{version}, expected {oldest()}", INSTALL)
    found = f"{version}, CPU capability {capability}, CUDA {'yes' if has_cuda else 'no'}"
    if device != "cpu" and not has_cuda:
        advice = f'the config says device = "{device}"; install a torch with CUDA, or set "cpu"'
        return Finding("torch", "fail", found, advice)
    return Finding("torch", "ok", found)


def check_memory(cap_bytes: int | None = None, root: Path = ROOT) -> Finding:
    total, free, bound = memory(cap_bytes, root=root)
    found = f"{mebibytes(free)} for training (bound: {bound}) of {mebibytes(total)}"
    if free >= LEAST_MEMORY:
        return Finding("memory", "ok", found)
    advice = f"torch with a small model takes {mebibytes(LEAST_MEMORY)}; " + (
        "raise memory_cap" if bound == "cap" else "end other programs, or take a larger board"
    )
    return Finding("memory", "warn", found, advice)


def check_memory_group(root: Path = ROOT) -> Finding:
    """Whether the kernel limits memory; Raspberry Pi OS has it switched off on some images."""
    name = "memory cgroup"
    controllers = read_text(root / "sys/fs/cgroup/cgroup.controllers").split()
    first_version = re.search(
        r"^memory\s+\d+\s+\d+\s+(\d)", read_text(root / "proc/cgroups"), re.MULTILINE
    )
    if "memory" in controllers or (first_version and first_version[1] == "1"):
        return Finding(name, "ok", "enabled")
    files = ("boot/firmware/cmdline.txt", "boot/cmdline.txt")
    file = next((f"/{file}" for file in files if (root / file).exists()), "the kernel command line")
    advice = (
        "the service's MemoryMax does nothing: add cgroup_enable=memory cgroup_memory=1 to the one "
        f"line of {file} and reboot"
    )
    return Finding(name, "warn", "not enabled", advice)


def check_clock(now: datetime.datetime, root: Path = ROOT) -> Finding:
    found = f"{now:%Y-%m-%d %H:%M} UTC"
    advice = (
        "timedatectl set-ntp true; boards without a battery need a time server after each start"
    )
    if now < EARLIEST:
        return Finding("clock", "fail", f"{found}, before this program was written", advice)
    timesync = root / "run/systemd/timesync"
    if timesync.is_dir() and not (timesync / "synchronized").exists():
        return Finding("clock", "warn", f"{found}, not synchronised yet", advice)
    return Finding("clock", "ok", found)


def check_disk(folder: Path) -> Finding:
    folder = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    free = shutil.disk_usage(folder).free
    found = f"{mebibytes(free)} free at {folder}"
    if free >= LEAST_DISK:
        return Finding("disk", "ok", found)
    return Finding("disk", "warn", found, f"make room: less than {mebibytes(LEAST_DISK)} is left")


def check_jetson(root: Path = ROOT) -> Finding:
    """JetPack by its release file, jetson-stats (jtop) by package and by its service's socket."""
    name, _ = board_name(root)
    release = re.search(r"R(\d+) .*REVISION: ([\d.]+)", read_text(root / "etc/nv_tegra_release"))
    if not release and not name.startswith("jetson"):
        return Finding("jetson", "ok", "this is none")
    if not release:
        advice = "install NVIDIA's JetPack, whose torch knows the GPU"
        return Finding("jetson", "warn", f"{name} without JetPack", advice)
    jetpack = JETPACKS.get(release[1], "unknown")
    found = f"JetPack {jetpack} (Jetson Linux {release[1]}.{release[2]})"
    if jetpack in ("4", "5"):
        advice = "its Python is older than 3.10: flash JetPack 6, or train on the CPU with another"
        return Finding("jetson", "warn", found, advice)
    try:
        found += f", jetson-stats {importlib.metadata.version('jetson-stats')}"
    except importlib.metadata.PackageNotFoundError:
        advice = f"optional, tells the module's name: {install('jetson')}"
        return Finding("jetson", "ok", f"{found}, no jetson-stats", advice)
    if not (root / "run/jtop.sock").exists():
        advice = "its service is not running: sudo jtop --install-service, then reboot"
        return Finding("jetson", "warn", found, advice)
    what, _, advice = jetson_stats().problem.partition("; ")
    if what:
        return Finding("jetson", "warn", f"{found}, but {what}", advice)
    return Finding("jetson", "ok", found)


def check_conditions(root: Path = ROOT) -> Finding:
    """Heat, throttling, supply and battery as they are now."""
    now = conditions.read(root)
    found, allowance = conditions.in_words(now), conditions.allowed(now)
    if now.is_under_voltage:
        advice = "the supply is too weak: a better one, and a short thick cable"
    elif now.battery_percent is not None and "battery" in allowance.reason:
        advice = "charge it"
    else:
        advice = "cool it: a heat sink, a fan, room for air" if allowance.reason else ""
    return Finding("conditions", "warn" if advice else "ok", found, advice)


# -- this device's settings -----------------------------------------------------------------------


def check_config(path: Path | None) -> tuple[Settings, Finding]:
    if path is None and not DEFAULT_CONFIG.exists():
        advice = "for a service: sudo edge-sdk service install"
        return Settings(), Finding("config", "ok", "no config file", advice)
    try:
        settings = read_config(path or DEFAULT_CONFIG)
    except ConfigError as error:
        return Settings(), Finding("config", "fail", str(error), "correct that line")
    return settings, Finding("config", "ok", str(path or DEFAULT_CONFIG))


def check_data(data: str | None, *, is_service: bool) -> Finding:
    """Whether the data can be read; what is in them the trainer judges."""
    if data is None:
        return Finding("data", "warn", "not set", "set data in the config, or give run --data")
    path = Path(data)
    if not path.is_absolute():
        return Finding("data", "ok", f"the data set {data}")
    if is_service and is_hidden(data):
        return Finding("data", "fail", f"{path} is hidden from the service", f"move it to {STATE}")
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a null byte
        return Finding("data", "fail", f"{data!r}: {error}", "correct data in the config")
    is_private = is_service and not mode & 0o004 and STATE not in path.parents
    if is_private or not os.access(path, os.R_OK):
        return Finding("data", "fail", f"{path} is not readable for all", f"chmod a+r {path}")
    return Finding("data", "ok", str(path))


def check_keys(
    folder: Path, server_key: str | None, *, is_insecure: bool
) -> tuple[tuple[KeyPair, bytes] | None, Finding]:
    """This device's pair and the coordinator's key, if both can be read."""
    if is_insecure:
        advice = "everybody can read what is sent and pretend to be this device; make keys"
        return None, Finding("keys", "warn", "insecure = true", advice)
    try:
        pair = read_all_keys(folder, server_key)
    except EdgeError as error:
        found, advice = str(error), _keys_advice(folder)
        if isinstance(error.__cause__, FileNotFoundError):
            found, _, advice = found.partition("; ")
        return None, Finding("keys", "fail", found, advice)
    secret = (folder / f"{DEVICE_KEYS}.secret").stat()
    owner = (
        STATE.stat().st_uid if STATE in folder.parents and os.path.exists(STATE) else secret.st_uid
    )
    if secret.st_uid != owner:
        advice = f"chown {owner} {folder}/*: they belong to the service's own user"
        return pair, Finding("keys", "fail", f"{folder} has another owner than {STATE}", advice)
    return pair, Finding("keys", "ok", str(folder))


def _keys_advice(folder: Path) -> str:
    if os.geteuid() != 0 and not os.access(folder, os.X_OK):
        return "run the doctor with sudo, if the keys are the service's"
    own = f"edge-sdk keys --keys {folder} makes this device's"
    both = f"{own}, and server.public comes from the coordinator"
    return f"edge-sdk join LINE, with an invitation; or {both}"


def check_coordinator(
    endpoint: str | None, keys: tuple[KeyPair, bytes] | None, *, is_insecure: bool
) -> Finding:
    """Whether a TCP connection can be made, and a real handshake if there are keys to try."""
    from edge_sdk.protocol.reach import reach

    name = "coordinator"
    if endpoint is None:
        return Finding(name, "warn", "not set", "set coordinator in the config")
    found, problem = reach(endpoint)
    if problem:
        advice = (
            "is it running, is the address right, does a firewall drop it? A device waits for it"
        )
        return Finding(name, "fail", f"{endpoint} is not reached: {problem}", advice)
    if keys is None and not is_insecure:
        return Finding(name, "warn", f"{endpoint} answers, no handshake without keys", "make keys")
    if refusal := handshake(found, keys):
        why, _, advice = refusal.partition("; ")
        return Finding(name, "fail", f"{endpoint} answers, but: {why}", advice)
    advice = "not checked: whether it welcomes this device, as only `edge-sdk run` says hello"
    return Finding(name, "ok", f"{endpoint} takes this device's connection", advice)


def handshake(endpoint: str, keys: tuple[KeyPair, bytes] | None) -> str:
    """Why the coordinator refuses this device; "" when it does not. Nothing is sent."""
    import zmq

    from edge_sdk.protocol.link import Link

    pair, server_key = keys or (None, None)
    link = Link(endpoint, pair, server_key)
    try:
        until = time.monotonic() + CONNECT_S
        while time.monotonic() < until:
            if link.socket and link.socket.poll(100, zmq.POLLOUT):
                return ""  # only a finished handshake makes a connection that takes messages
            if refusal := link.events()[1]:
                return refusal
    finally:
        link.close(is_final=True)
    return f"no handshake within {CONNECT_S:g} s; is it an edge-coordinator?"


def report(findings: Iterator[Finding], show: Callable[[str], None]) -> list[Finding]:
    """Show one or two lines for each finding as it comes; all of them."""
    done = []
    for finding in findings:
        done.append(finding)
        show(f"{finding.outcome:<5} {finding.name:<14} {finding.found}")
        if finding.advice:
            show(f"{'':<20} {finding.advice}")
    return done
