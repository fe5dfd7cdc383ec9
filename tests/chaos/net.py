"""Network namespaces for a coordinator and its devices, with a bad link (relay.py) to each device.

Namespaces have no names: each lives as long as the process that holds it, and the holders, like the
relay, are killed by the kernel when the test process ends, however it ends. Nothing is left over.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RATE_BIT_S, DELAY_S, LOSS, QUEUE_S = 20e6, 0.020, 0.01, 0.3
RELAY = Path(__file__).with_name("relay.py")
TIED = ["setpriv", "--pdeathsig", "KILL", "--"]  # ends with this process
CONGESTION = ("bbr", "reno")


def what_is_missing() -> str:
    """Why namespaces and a relay cannot be had here; "" if they can."""
    if os.geteuid():
        return "needs root rights for network namespaces"
    lacking = [name for name in ("ip", "nsenter", "unshare", "setpriv") if not shutil.which(name)]
    if lacking:
        return f"needs the programs {', '.join(lacking)} (iproute2, util-linux)"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"needs /dev/net/tun: {error.strerror}"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False
    )
    return f"needs namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def lacks_congestion(name: str) -> str:
    """Why a namespace cannot use this congestion control; "" if it can."""
    command = ["unshare", "--net", "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={name}"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"needs congestion control {name}: {tried.stderr.strip()}" if tried.stderr else ""


class Host:
    """A network and a mount namespace, held by a sleeping process. address: that of its link."""

    def __init__(self, number: int, congestion: str) -> None:
        self.number = number
        self._last = 1  # of its address; 1 or 2
        script = (
            "set -e; ip link set lo up; "
            f"sysctl -qw net.ipv4.tcp_congestion_control={congestion}; echo; exec sleep infinity"
        )
        unshare = ["unshare", "--net", "--mount", "--propagation", "private"]
        self._holder = subprocess.Popen(
            [*TIED, *unshare, "sh", "-c", script],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        with self._holder.stdout as said:
            assert said.readline() == b"\n", f"no namespace with {congestion}"

    @property
    def pid(self) -> int:
        return self._holder.pid

    @property
    def address(self) -> str:
        return f"10.77.{self.number}.{self._last}"

    def inside(self, *environment: str, mount: bool = False) -> list[str]:
        """The beginning of a command that runs in here and ends with this process. environment:
        NAME=VALUE texts."""
        spaces = [f"--net=/proc/{self.pid}/ns/net"]
        spaces += [f"--mount=/proc/{self.pid}/ns/mnt"] if mount else []
        return [*TIED, "nsenter", *spaces, "--", "env", f"--chdir={os.getcwd()}", *environment]

    def run(self, *command: str) -> None:
        subprocess.run([*self.inside(mount=True), *command], check=True, stdin=subprocess.DEVNULL)

    def seen(self, path: Path) -> Path:
        """A path of this mount namespace as the test process can open it."""
        return Path(f"/proc/{self.pid}/root{path.resolve()}")

    def move(self) -> None:
        """Another address of the same network: what was connected before gets no packet more."""
        device, old = f"edge{self.number}", self.address
        self._last = 3 - self._last
        self.run("ip", "address", "del", f"{old}/16", "dev", device)
        self.run("ip", "address", "add", f"{self.address}/16", "dev", device)

    def end(self) -> None:
        self._holder.kill()
        self._holder.wait()


class Net:
    """Hosts 0 (the coordinator's) to num_devices, and the relay between them."""

    def __init__(self, num_devices: int, congestion: str, *, seed: int = 1) -> None:
        self.congestion = congestion
        self.hosts: list[Host] = []
        self._relay: subprocess.Popen[bytes] | None = None
        try:
            for number in range(num_devices + 1):
                self.hosts.append(Host(number, congestion))
            self._relay = self._start(seed)
        except BaseException:
            self.end()
            raise

    def _start(self, seed: int) -> subprocess.Popen[bytes]:
        settings = {
            "hosts": [host.pid for host in self.hosts],
            "delay_s": DELAY_S,
            "loss": LOSS,
            "rate_bit_s": RATE_BIT_S,
            "queue_s": QUEUE_S,
            "seed": seed,
        }
        command = [sys.executable, str(RELAY), json.dumps(settings)]
        relay = subprocess.Popen(
            [*TIED, "unshare", "--net", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert relay.stdout is not None
        assert relay.stdout.readline() == b"{}\n", "the relay did not start"
        return relay

    def ask(self, link: int = 0, **settings: Any) -> dict[str, dict[str, dict[str, Any]]]:
        """Set fields of a link's directions (relay.Direction); the state of all of them."""
        assert self._relay is not None
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        self._relay.stdin.write(json.dumps({"link": link, **settings}).encode() + b"\n")
        self._relay.stdin.flush()
        answer = self._relay.stdout.readline()
        assert answer, "the relay has ended"
        state: dict[str, dict[str, dict[str, Any]]] = json.loads(answer)
        return state

    def cut(self, link: int) -> None:
        self.ask(link, is_cut=True, cut_after=None)

    def mend(self, link: int) -> None:
        self.ask(link, is_cut=False, cut_after=None)

    def cut_after(self, link: int, way: str, num_bytes: int) -> None:
        """Cut the link, both ways, once so many bytes more have passed this way."""
        self.ask(link, way=way, cut_after=num_bytes)

    def is_cut(self, link: int) -> bool:
        return bool(self.ask()[str(link)]["up"]["is_cut"])

    def end(self) -> None:
        if self._relay is not None:
            for pipe in (self._relay.stdin, self._relay.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._relay.kill()
            self._relay.wait()
        for host in self.hosts:
            host.end()


@contextlib.contextmanager
def network(num_devices: int, congestion: str, *, seed: int = 1) -> Iterator[Net]:
    net = Net(num_devices, congestion, seed=seed)
    try:
        yield net
    finally:
        net.end()
