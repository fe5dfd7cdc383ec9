"""What an agent was told, and how it looks at its device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from edge_sdk.agent.events import Event
from edge_sdk.agent.own_model import OwnModel
from edge_sdk.agent.pipe import Inspected, TrainerOptions
from edge_sdk.hardware.conditions import FULL, Allowance, Conditions, allowed, slowed
from edge_sdk.protocol.messages import DeviceProfile


@dataclass(frozen=True)
class AgentOptions:
    """What `edge-sdk run` or a Client was told. measure(own_bytes): the profile now, own_bytes
    being what the trainer holds already. conditions(): heat, throttling and battery now; None: they
    are not looked at. Both are called every heartbeat and must be cheap."""

    client_id: str
    trainer: TrainerOptions
    measure: Callable[[int], DeviceProfile]
    conditions: Callable[[], Conditions] | None = None
    is_once: bool = False  # end when the coordinator's run ends
    notify_socket: str = ""  # systemd's NOTIFY_SOCKET
    on_event: Callable[[Event], object] | None = None  # called in run()'s thread
    own_model: OwnModel | None = None
    search_path: tuple[str, ...] = ()  # where the trainer finds modules; (): as python does


class Senses:
    """What the device has now, and how much work its conditions allow."""

    def __init__(self, options: AgentOptions) -> None:
        self._options = options
        self._allowance = FULL  # the last one

    def profile(self, own_bytes: int, inspected: Inspected | None) -> DeviceProfile:
        """This device now, with the speed that the trainer measured, if it did. own_bytes: what
        the trainer holds already."""
        profile = self._options.measure(own_bytes)
        if inspected and inspected.gflops:
            profile = replace(profile, gflops=inspected.gflops, layer_s=inspected.layer_s)
        return profile

    def look(self, profile: DeviceProfile) -> tuple[DeviceProfile, Allowance]:
        """The profile, slowed as throttling slows training on a CPU, and the work allowed."""
        if self._options.conditions is None:
            return profile, FULL
        now = self._options.conditions()
        self._allowance = allowed(now, self._allowance.work)
        if self._options.trainer.device == "cpu":
            profile = slowed(profile, now)
        return profile, self._allowance
