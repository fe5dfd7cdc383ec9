"""A bad link in user space, for kernels without netem: IP packets between TUN devices.

    python relay.py '{"hosts": [PID, ...], "seed": 1, ...}'

One TUN device in the network namespace of each PID. Host 0 is the coordinator; between it and each
other host i lies link i, with a delay, a loss, a rate and a queue of its own in each direction. A
link is cut by dropping everything, as a dead radio does: nobody is told. Orders come as JSON lines
on stdin, each is answered by one on stdout; the relay, and the devices with it, ends with stdin.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 1500
WAYS = ("up", "down")  # from a device, to a device


@dataclass
class Direction:
    """One way of one link. cut_after: bytes that may still pass before the whole link is cut."""

    loss: float
    rate_bit_s: float
    is_cut: bool = False
    cut_after: int | None = None
    free_at: float = 0.0  # when the last packet will have left
    passed: int = 0  # bytes
    dropped: dict[str, int] = field(
        default_factory=lambda: {"cut": 0, "loss": 0, "queue": 0}
    )  # packets


class Relay:
    """hosts: open TUN devices, the coordinator's first. Delays and queues in seconds."""

    def __init__(
        self,
        hosts: list[int],
        *,
        delay_s: float,
        loss: float,
        rate_bit_s: float,
        queue_s: float,
        seed: int,
    ) -> None:
        self._hosts = hosts
        self._delay_s, self._queue_s = delay_s, queue_s
        self._random = random.Random(seed)
        self._due: list[tuple[float, int, int, bytes]] = []  # when, order, to whom, packet
        self._order = 0
        self._links = {
            number: {way: Direction(loss, rate_bit_s) for way in WAYS}
            for number in range(1, len(hosts))
        }

    def run(self) -> None:
        orders = sys.stdin.fileno()
        unread = b""
        while True:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            ready, _, _ = select.select([orders, *self._hosts], [], [], wait)
            for number, host in enumerate(self._hosts):
                if host in ready:
                    self._take(number, os.read(host, 65536))
            if orders in ready:
                text = os.read(orders, 65536)
                if not text:
                    return
                *lines, unread = (unread + text).split(b"\n")
                for line in lines:
                    print(json.dumps(self._obey(json.loads(line))), flush=True)
            self._deliver()

    def _take(self, source: int, packet: bytes) -> None:
        """Queue or drop what one host sends. Address 10.77.N.x belongs to host N."""
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return
        target = packet[18]
        number, way = (source, "up") if source else (target, "down")
        if (source and target) or number not in self._links:
            return
        direction, now = self._links[number][way], time.monotonic()
        backlog_s = direction.free_at - now
        for reason, is_dropped in (
            ("cut", direction.is_cut),
            ("loss", self._random.random() < direction.loss),
            ("queue", backlog_s > self._queue_s),
        ):
            if is_dropped:
                direction.dropped[reason] += 1
                return
        direction.free_at = max(now, direction.free_at) + 8 * len(packet) / direction.rate_bit_s
        self._order += 1
        due = direction.free_at + self._delay_s
        heapq.heappush(self._due, (due, self._order, target, packet))
        direction.passed += len(packet)
        if direction.cut_after is not None:
            direction.cut_after -= len(packet)
            if direction.cut_after <= 0:
                direction.cut_after = None
                for each in self._links[number].values():
                    each.is_cut = True

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, target, packet = heapq.heappop(self._due)
            try:
                os.write(self._hosts[target], packet)
            except OSError:  # the host's device is down
                continue

    def _obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """{"link": N, "way": "up", field: value, ...} sets a direction (no way: both); {} asks."""
        link = self._links.get(order.pop("link", 0), {})
        way = order.pop("way", None)
        for name, direction in link.items():
            if way in (None, name):
                for key, value in order.items():
                    setattr(direction, key, value)
        return {
            str(number): {way: vars(direction) for way, direction in link.items()}
            for number, link in self._links.items()
        }


def open_tun(number: int, pid: int) -> int:
    """A TUN device of ours that shows in the namespace of `pid` as edge0 with 10.77.NUMBER.1."""
    handle = os.open("/dev/net/tun", os.O_RDWR)
    name = f"edge{number}"
    request = struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI)
    fcntl.ioctl(handle, TUNSETIFF, request)
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net"]
    for command in (
        ["ip", "link", "set", name, "netns", str(pid)],
        [*inside, "ip", "address", "add", f"10.77.{number}.1/16", "dev", name],
        [*inside, "ip", "link", "set", name, "mtu", str(MTU), "up"],
    ):
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return handle


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    tuns = [open_tun(number, pid) for number, pid in enumerate(settings.pop("hosts"))]
    print(json.dumps({}), flush=True)
    Relay(tuns, **settings).run()
