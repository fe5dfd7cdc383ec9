"""Who this device is and how its agent is made: for `edge-sdk run` and for `Client`, which name a
setting `--server-key` or `server_key` in what they refuse."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

from edge_sdk.agent.agent import Agent
from edge_sdk.agent.options import AgentOptions
from edge_sdk.agent.pipe import TrainerOptions
from edge_sdk.agent.settings import RunSettings
from edge_sdk.errors import ConfigError
from edge_sdk.hardware.measure import measure
from edge_sdk.helpers.files import home
from edge_sdk.protocol.fields import CLIENT_NAME, CLIENT_NAME_IN_WORDS
from edge_sdk.protocol.keys import KeyPair, read_all_keys
from edge_sdk.protocol.link import Link
from edge_sdk.protocol.messages import DeviceProfile

log = logging.getLogger(__name__)
# This device's pair and the coordinator's public key; None and None: no encryption.
Secrets: TypeAlias = tuple[KeyPair | None, bytes | None]


def make_agent(endpoint: str, secrets: Secrets, options: AgentOptions) -> Agent:
    """Start the trainer and connect; the agent's run() does the rest."""
    link = Link(endpoint, *secrets)
    try:
        return Agent(link, options)
    except BaseException:
        link.close(is_final=True)
        raise


def checked_id(name: str | None, flag: str) -> str:
    """The name, or the host's for None. flag: what an error tells to give. Raises ConfigError."""
    client_id = name or socket.gethostname()
    if not re.match(CLIENT_NAME, client_id):
        raise ConfigError(f"device name {client_id!r} is not {CLIENT_NAME_IN_WORDS}; give {flag}")
    return client_id


def device_secrets(settings: RunSettings, server_key_flag: str) -> Secrets:
    """The keys of the settings' folder; insecure: none. Raises ConfigError."""
    if settings.insecure:
        log.warning("insecure: nothing is encrypted and anybody can pretend to be this device")
        return None, None
    return read_all_keys(settings.keys, settings.server_key, server_key_flag)


def trainer_options(
    settings: RunSettings, client_id: str, secrets: Secrets, *, is_emulated: bool = False
) -> TrainerOptions:
    """How the trainer of this device starts. One of an emulated board measures nothing and writes
    but what never travels again: its figures are another device's."""
    cache, updates = "", ""
    beside = saved_updates_folder(client_id, settings.coordinator or "", secrets)
    if not is_emulated:
        cache, updates = memory_calibration_file(), beside
    return TrainerOptions(
        data=settings.data or "",
        threads=settings.threads,
        device=settings.device,
        measure_compute=not is_emulated,
        calibration=cache,
        saved_updates=updates,
        kept_tensors=beside,
        imports=settings.imports,
        augment=settings.augment or "",
    )


def default_keys() -> Path:
    """The folder of this device's keys where none is named. Under systemd it is the service's own
    state folder, else the user's configuration. Raises ConfigError without a home."""
    state = os.environ.get("STATE_DIRECTORY")
    return Path(state) / "keys" if state else home() / ".config" / "edge-sdk"


def memory_calibration_file() -> str:
    """The file of this device's memory calibration, in the service's cache folder or the user's.
    Raises ConfigError without a home."""
    service, user = os.environ.get("CACHE_DIRECTORY"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(service) if service else Path(user or home() / ".cache") / "edge-sdk"
    return str(folder / "calibration.json")


def saved_updates_folder(client_id: str, endpoint: str, secrets: Secrets) -> str:
    """The folder of this device's saved update, one for each coordinator. That is known by its key,
    which stays when its address changes."""
    coordinator = secrets[1] or endpoint.encode()
    mark = hashlib.sha256(coordinator).hexdigest()[:12]
    return str(Path(memory_calibration_file()).parent / "updates" / f"{client_id}-{mark}")


def measure_here(cap_bytes: int | None) -> Callable[[int], DeviceProfile]:
    """The function by which the agent measures this machine, within a cap on memory."""
    return partial(measure, cap_bytes, compute=False)
