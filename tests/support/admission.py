"""A router with its lists, for tests of who may join; `gate` and `member` of conftest.py
are made with it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import zmq

from coordinator.admission.client_list import Admission
from coordinator.admission.invitations import Invitation, read_invitations, write_invitation
from coordinator.cli.main import main as coordinate
from coordinator.links.router import Received, Router
from edge_sdk.protocol.invitation import InvitationLine
from edge_sdk.protocol.keys import KeyPair, make_keys, read_keys
from edge_sdk.protocol.messages import Heartbeat
from tests.support.devices import ANY_PORT, WAIT_S, ScriptedDevice
from tests.support.examples import settle

DAY_S = 24 * 3600.0
LINE = InvitationLine("tcp://192.0.2.1:5555", "pi-1", *(zmq.curve_keypair()))


class Gate:
    """A coordinator's router that takes messages in a thread of its own; what passes it is kept.

    folder: of its keys and lists, made here."""

    def __init__(self, folder: Path, endpoint: str = ANY_PORT) -> None:
        self.clients = folder / "clients"
        self.invitations = folder / "invitations"
        self.pending = folder / "pending"
        if not self.clients.exists():
            make_keys(folder, "server")
            self.clients.write_text("# those who may\n")
            settle(self.clients)
        self.keys = read_keys(folder, "server")
        self.router = Router(endpoint, self.keys, Admission(self.clients))
        self.endpoint = self.router.endpoint
        self.passed: list[str] = []  # types of the messages that a cohort would see
        self._is_open = True
        self._devices: list[ScriptedDevice] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while self._is_open:
            _, received = self.router.receive(20)
            if isinstance(received, Received):
                self.passed.append(f"{received.name} {type(received.message).__name__}")
                self.router.send(received.route, Heartbeat())

    def invite(self, name: str | None = None, *, valid_s: float = DAY_S) -> InvitationLine:
        public, secret = zmq.curve_keypair()
        invitation = Invitation(
            public_key=public.decode(), name=name, expires=time.time() + valid_s
        )
        write_invitation(self.invitations, invitation)
        return InvitationLine(self.endpoint, name or "", self.keys.public, secret)

    def device(self, keys: KeyPair, name: str = "pi") -> ScriptedDevice:
        device = ScriptedDevice(self.endpoint, name, keys, self.keys.public)
        self._devices.append(device)
        return device

    def names(self) -> dict[str, bytes]:
        return Admission(self.clients).names()

    def files(self) -> tuple[str, str]:
        return self.clients.read_text(), self.invitations.read_text()

    def close(self) -> None:
        for device in self._devices:
            device.close()
        self._is_open = False
        self._thread.join(WAIT_S)
        self.router.close()


def pair_of(line: InvitationLine) -> KeyPair:
    return KeyPair(zmq.curve_public(line.secret), line.secret)


def new_key() -> str:
    """Public, of nobody; no flag for a command line, as make_keys has it."""
    while (key := zmq.curve_keypair()[0].decode()).startswith("-"):
        pass
    return key


def only_invitation(gate: Gate) -> Invitation:
    (invitation,) = read_invitations(gate.invitations)
    return invitation


def invited(gate: Gate, capsys, *flags: str) -> str:
    """The line that `invite` prints."""
    folder = str(gate.clients.parent)
    assert coordinate(["invite", "--keys", folder, "--endpoint", gate.endpoint, *flags]) == 0
    return capsys.readouterr().out
