"""How a device comes into the coordinator's list, and how it changes its key there.

Both ask one question, `join`, on a link of its own: joining under the invitation's key, a rotation
under the device's present key. The answer may be lost, so asking again is always safe. During a
rotation the new pair lies beside the old one until the coordinator has confirmed it: whatever is
cut short, one of the two is in the list, and the next rotation or join finds out which."""

from __future__ import annotations

import time
from pathlib import Path

import zmq

from edge_sdk.errors import LinkError, ProtocolError
from edge_sdk.protocol.invitation import InvitationLine
from edge_sdk.protocol.keys import (
    DEVICE_KEYS,
    KeyPair,
    drop_next_keys,
    has_next_keys,
    next_keys,
    own_keys,
    read_keys,
    swap_keys,
)
from edge_sdk.protocol.link import REFUSALS, Link
from edge_sdk.protocol.messages import Fault, Join, Joined, Message

CONNECT_S = 20.0  # to reach the coordinator
ANSWER_S = 300.0  # then, as it answers nothing while it aggregates
AGAIN_S = 5.0  # between questions: one may be lost, or meet a list that another changes just now
UNKNOWN = REFUSALS[zmq.EVENT_HANDSHAKE_FAILED_AUTH]


class Refused(LinkError):
    """The coordinator does not admit the key that asks, or not what it asks for."""


def join(line: InvitationLine, folder: Path, client_id: str) -> KeyPair:
    """Use the invitation. Returns the pair of keys in `folder` that is admitted then, made if there
    was none.

    Raises LinkError (Refused: by the coordinator), ConfigError."""
    keys = own_keys(folder)
    if has_next_keys(folder):  # a rotation was cut short: the new key may be the one in the list
        new = next_keys(folder)
        try:
            _ask(line.endpoint, new, line.server_key, client_id, new)
        except Refused:
            pass
        else:
            swap_keys(folder)
            return new
    invitation = KeyPair(zmq.curve_public(line.secret), line.secret)
    try:
        _ask(line.endpoint, invitation, line.server_key, client_id, keys)
        drop_next_keys(folder)
    except Refused as error:
        if str(error) != UNKNOWN:
            raise
        _confirm(line, client_id, keys)
    return keys


def _confirm(line: InvitationLine, client_id: str, keys: KeyPair) -> None:
    """The invitation is not taken any more: this device may have used it, and missed the answer.
    Raises LinkError (Refused: its own key is not admitted either)."""
    try:
        _ask(line.endpoint, keys, line.server_key, client_id, keys)
    except Refused as error:
        if str(error) != UNKNOWN:
            raise
        why = "it was used already, expired or withdrawn, or is another coordinator's"
        said = f"{line.endpoint} refused this invitation: {why}; ask for a new one"
        raise Refused(said) from error


def rotate(endpoint: str, server_key: bytes, folder: Path, client_id: str) -> KeyPair:
    """Change the device's keys. Returns its new pair, which is then the one in the coordinator's
    list and in `folder`. Raises LinkError (Refused: neither key is admitted), ConfigError."""
    old = read_keys(folder, DEVICE_KEYS)
    new = next_keys(folder)
    try:
        _ask(endpoint, old, server_key, client_id, new)
    except Refused as refusal:
        # An earlier try may have been heard: just now, after this one's connection was let in, or
        # by another coordinator than who hangs up here. So the next pair stays, whatever is said.
        try:
            _ask(endpoint, new, server_key, client_id, new)
        except Refused as error:
            if not str(refusal) == str(error) == UNKNOWN:
                raise refusal from error
            raise Refused(
                f"{endpoint} knows neither this device's key nor the next one; let it be invited, "
                "and run `edge-sdk join`"
            ) from refusal
    swap_keys(folder)
    return new


def _ask(endpoint: str, keys: KeyPair, server_key: bytes, client_id: str, wanted: KeyPair) -> None:
    """Ask by `keys` that `wanted` be admitted. Raises LinkError (Refused: it is not)."""
    question = Join(client_id=client_id, public_key=wanted.public.decode())
    link = Link(endpoint, keys, server_key)
    try:
        answer = _answer(link, question)
    finally:
        link.close(is_final=True)
    if isinstance(answer, Fault):
        raise Refused(f"the coordinator at {endpoint} refused: {answer.detail}")
    if answer != Joined(client_id=client_id):
        raise LinkError(f"{endpoint} answered {type(answer).__name__} to join; is it of this age?")


def _answer(link: Link, question: Join) -> Message:
    """Ask until something comes back, and return it. Raises LinkError."""
    give_up, ask_at, was_connected = time.monotonic() + CONNECT_S, 0.0, False
    while (now := time.monotonic()) < give_up:
        if now >= ask_at and link.send(question):
            ask_at = now + AGAIN_S
            if not was_connected:
                was_connected, give_up = True, now + ANSWER_S
        link.wait(500, wants_to_send=time.monotonic() >= ask_at)
        if refusal := link.events()[1]:
            raise Refused(refusal)
        link.absence()  # looks into why there is no connection
        try:
            received = link.receive()
        except ProtocolError as error:
            raise LinkError(
                f"{link.endpoint} answers what this edge-sdk cannot read: {error}"
            ) from error
        if received is not None:
            return received[0]
    if was_connected:
        raise LinkError(
            f"{link.endpoint} is reached but has not answered for {ANSWER_S:g} s; is it busy? try "
            "again, nothing is lost by that"
        )
    reason = f" ({why})" if (why := link.absence()) else ""
    raise LinkError(
        f"{link.endpoint} is not reached for {CONNECT_S:g} s{reason}; is the coordinator running, "
        "is the address right? try again, nothing is lost by that"
    )
