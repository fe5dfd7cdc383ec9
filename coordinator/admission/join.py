"""The answer to `join`: a device with an invitation comes into the list, a client gets a new key.

Whatever is refused changes nothing. What was done once is answered alike again: the answer may have
been lost. An invitation is marked before its device is written into the list and marked done after
it, so a coordinator that is killed between neither forgets the device nor admits another; once it
is done, a client that was removed does not come back with it.
"""

from __future__ import annotations

import datetime
import logging
import time

from msgspec.structs import replace

from coordinator.admission.client_list import (
    Admission,
    parse_clients,
    put_client,
    read_list,
    replace_client,
)
from coordinator.admission.invitations import Invitation, read_invitations, write_invitation
from edge_sdk.errors import ConfigError
from edge_sdk.helpers.files import locked
from edge_sdk.protocol.keys import check_key
from edge_sdk.protocol.messages import Fault, Join, Joined

log = logging.getLogger(__name__)
NEW_ONE = "ask for a new one, `edge-coordinator invite` makes it"


class _Refusal(Exception):
    """Its text is for the person at the device."""


def answer(admission: Admission, sender: bytes, join: Join) -> Joined | Fault | None:
    """sender: the public key of the connection. None: the list is being changed, the device asks
    again."""
    try:
        key = _checked(join)
        with locked(admission.path.parent, is_patient=False):
            text = read_list(admission.path)
            if admission.is_changing():
                return None
            if not text.strip() and admission.names():
                raise ConfigError(f"{admission.path} is empty or gone, which revokes nobody")
            if name := admission.name_of(sender):
                _rotate(admission, text, name, sender, join, key)
            else:
                _admit(admission, text, sender, join, key)
    except BlockingIOError:
        return None
    except _Refusal as refusal:
        log.warning("join of %s refused: %s", join.client_id, refusal)
        return Fault(code="admission", detail=str(refusal))
    except (ConfigError, OSError) as error:
        log.error("join of %s failed: %s", join.client_id, error)
        detail = "the coordinator could not write its list, its log says why; try again later"
        return Fault(code="admission", detail=detail)
    return Joined(client_id=join.client_id)


def _checked(join: Join) -> bytes:
    try:
        return check_key(join.public_key, "join")
    except ConfigError as error:
        raise _Refusal(str(error)) from error


def _admit(admission: Admission, text: str, sender: bytes, join: Join, key: bytes) -> None:
    """By invitation. text: of the list. Raises _Refusal, ConfigError, OSError."""
    path = admission.invitations.path
    invitation = _usable(read_invitations(path), sender, join)
    clients = parse_clients(text, str(admission.path))
    if clients.get(key) == join.client_id:
        if not invitation.is_done:
            write_invitation(path, _used(invitation, join, is_done=True))
        return
    if invitation.is_done:
        raise _Refusal(f"this invitation was used already; {NEW_ONE}")
    if admission.invitations.find(key):
        raise _Refusal("an invitation's key is nobody's own; make a key pair on the device")
    _check_free(clients, join, key)
    write_invitation(path, _used(invitation, join))
    put_client(admission.path, text, join.client_id, key)
    admission.reload(is_own=True)
    write_invitation(path, _used(invitation, join, is_done=True))
    log.info("%s joined the list by invitation, public key %s", join.client_id, join.public_key)


def _usable(invitations: list[Invitation], sender: bytes, join: Join) -> Invitation:
    """The sender's invitation, if it may be used for this join. Raises _Refusal."""
    found = [i for i in invitations if i.public_key.encode() == sender]
    if not found:
        raise _Refusal(f"this invitation was withdrawn; {NEW_ONE}")
    invitation = found[0]
    if time.time() >= invitation.expires:
        raise _Refusal(f"this invitation expired at {in_words(invitation.expires)}; {NEW_ONE}")
    if invitation.name not in (None, join.client_id):
        raise _Refusal(f"this invitation is for {invitation.name!r}, not for {join.client_id!r}")
    if invitation.client_key not in (None, join.public_key) or (
        invitation.client not in (None, join.client_id)
    ):
        raise _Refusal(f"this invitation was used already; {NEW_ONE}")
    return invitation


def _rotate(
    admission: Admission, text: str, name: str, sender: bytes, join: Join, key: bytes
) -> None:
    """A client's own new key. text: of the list. Raises _Refusal, ConfigError, OSError."""
    if join.client_id != name:
        raise _Refusal(f"this key is that of {name!r}, join says {join.client_id!r}")
    if key == sender:
        return  # the new key itself asks whether it is in force
    clients = parse_clients(text, str(admission.path))
    if clients.get(sender) != name:
        raise _Refusal("this device is not admitted any more")
    if key in clients or admission.invitations.find(key):
        raise _Refusal("the new key is in use already; make another")
    replace_client(admission.path, text, name, key)
    admission.reload(is_own=True)
    log.info("%s has a new public key, %s", name, join.public_key)


def _check_free(clients: dict[bytes, str], join: Join, key: bytes) -> None:
    if key in clients:
        raise _Refusal(f"this device's key is in the list already, as {clients[key]!r}")
    if join.client_id in clients.values():
        raise _Refusal(
            f"the name {join.client_id!r} is taken by another key; give another --id, or first "
            f"`edge-coordinator clients remove {join.client_id}`"
        )


def _used(invitation: Invitation, join: Join, *, is_done: bool = False) -> Invitation:
    return replace(invitation, client=join.client_id, client_key=join.public_key, is_done=is_done)


def in_words(seconds: float) -> str:
    when = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return f"{when:%Y-%m-%d %H:%M} UTC"
