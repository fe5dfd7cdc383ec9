"""By which address a coordinator is reached, and if by none, why: in words that tell a name that
does not resolve from a port where nobody listens and from a route that drops.

ZeroMQ tells none of that, tries one address of a name only, and resolves in the thread that serves
all connections. Here it is done in a thread of its own: a name server may take a minute."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from contextlib import ExitStack
from typing import NamedTuple, TypeAlias, cast

from edge_sdk.helpers.text import split_endpoint

TRY_S = 5.0  # for an address to take a connection
MOST_ADDRESSES = 8  # of a name
SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int]


class Reached(NamedTuple):
    """endpoint: numeric, to connect to; "": none. problem: why not, in one line."""

    endpoint: str = ""
    problem: str = ""


class Search(threading.Thread):
    """Looks for a coordinator once; result: None until it is known."""

    def __init__(self, endpoint: str, *, is_tried: bool) -> None:
        super().__init__(name="search", daemon=True)
        self._endpoint, self._is_tried = endpoint, is_tried
        self.since = time.monotonic()
        self.result: Reached | None = None
        self.start()

    def run(self) -> None:
        self.result = reach(self._endpoint, is_tried=self._is_tried)


def reach(endpoint: str, *, is_tried: bool = True) -> Reached:
    """The address of the host that takes a TCP connection, the first of them all that does. Without
    is_tried a single one is taken as it is."""
    host, port, is_ipv6 = split_endpoint(endpoint)
    try:
        # As bytes: of a text the encoding for international names is loaded first, 1 MB.
        name = host.encode() if host.isascii() else host
        found = socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        what = "address" if is_ipv6 else "name"
        return Reached(problem=f"the {what} {host!r} does not resolve: {said}")
    addresses = [cast(SocketAddress, entry[4]) for entry in found][:MOST_ADDRESSES]
    if len(addresses) == 1 and not is_tried:
        return Reached(_numeric(addresses[0]))
    return _first_to_answer(addresses)


def is_numeric(endpoint: str) -> bool:
    """Whether the endpoint's host is an address and no name."""
    host, _, is_ipv6 = split_endpoint(endpoint)
    try:
        socket.inet_aton(host)
    except OSError:
        return is_ipv6
    return True


def _first_to_answer(addresses: list[SocketAddress]) -> Reached:
    """All are tried at once: one that drops everything costs no time if another answers."""
    problems: dict[SocketAddress, str] = {}
    with ExitStack() as stack:
        poll, trying = select.poll(), {}
        for address in addresses:
            try:
                probe = socket.socket(_family(address), socket.SOCK_STREAM)
                stack.enter_context(probe)
                probe.setblocking(False)
                probe.connect(address)
            except BlockingIOError:
                poll.register(probe, select.POLLOUT)
                trying[probe.fileno()] = probe, address
            except OSError as error:
                problems[address] = str(error.strerror)
            else:
                return Reached(_numeric(address))
        until = time.monotonic() + TRY_S
        while trying and (left_s := until - time.monotonic()) > 0:
            for number, _ in poll.poll(1000 * left_s):
                poll.unregister(number)
                probe, address = trying.pop(number)
                if not (code := probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                    return Reached(_numeric(address))
                problems[address] = os.strerror(code)
    for _, address in trying.values():
        problems[address] = f"no answer within {TRY_S:g} s, does a firewall drop it?"
    told = [f"{_shown(address)}: {problem}" for address, problem in problems.items()]
    return Reached(problem=", ".join(told))


def _family(address: SocketAddress) -> socket.AddressFamily:
    return socket.AF_INET if len(address) == 2 else socket.AF_INET6


def _shown(address: SocketAddress) -> str:
    """HOST:PORT, an IPv6 address in brackets and with its interface."""
    if len(address) == 2:
        return f"{address[0]}:{address[1]}"
    host, port, _, interface = address
    return f"[{host}{f'%{interface}' if interface else ''}]:{port}"


def _numeric(address: SocketAddress) -> str:
    return f"tcp://{_shown(address)}"
