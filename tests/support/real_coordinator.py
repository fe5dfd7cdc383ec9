"""The real coordinator at the other end of scripted devices (devices.py)."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, TypeVar

from coordinator.admission.client_list import Admission, add_client
from coordinator.cohorts.base import Absence, Assignment, Client, ClientUpdate, Offer
from coordinator.fleet.cohort import ZmqCohort
from coordinator.fleet.flow_control import BUDGET_BYTES
from coordinator.fleet.spool import Spool
from coordinator.links.rate_limit import RateLimits
from coordinator.links.router import Router
from edge_sdk.protocol.keys import KeyPair, make_keys
from tests.support.devices import ANY_PORT, WAIT_S, ScriptedDevice
from tests.support.examples import config

T = TypeVar("T")
Result: TypeAlias = ClientUpdate | Absence


def make_cohort(
    router: Any,
    spool: Path,
    *,
    oldest: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    next_round: int = 1,
    give_up_after_s: float = 0.0,
    budget_bytes: int = BUDGET_BYTES,
    **settings: Any,
) -> ZmqCohort:
    """A cohort of the real kind for cnn(). oldest: rounds after which a late update is not taken
    any more, 0: none is. settings: changes to those of the run."""
    late = {"late": "accept", "staleness_half_life": oldest / 4} if oldest else {"late": "drop"}
    run = config("owners-mean", **({"quorum": 1.0, "min_clients": 1} | late | settings))
    assert run.oldest == oldest
    return ZmqCohort(
        router,
        Spool(spool),
        run,
        Offer(run.model, run.plan(run.rounds)),
        run="a run",
        give_up_after_s=give_up_after_s,
        budget_bytes=budget_bytes,
        should_stop=should_stop,
        next_round=next_round,
    )


class Coordinator:
    """The real Router and ZmqCohort. The cohort is used by one thread only, as it must be; what is
    asked of it comes back as a Future.

    folder: of keys and the client list; None: insecure. spool: of a coordinator that was there
    before; None: a new one. next_round: see ZmqCohort. terms: as for make_cohort."""

    def __init__(
        self,
        folder: Path | None,
        names: Sequence[str],
        spool: Path | None = None,
        next_round: int = 1,
        limits: RateLimits | None = None,
        **terms: Any,
    ) -> None:
        self.folder = folder
        self.names = tuple(names)
        self.keys: dict[str, KeyPair] = {}
        self.clients_file = folder / "clients" if folder else None
        if folder:
            self.keys = {name: make_keys(folder, name) for name in ("server", *names)}
            for name in names:
                add_client(folder / "clients", name, self.keys[name].public)
        admission = Admission(self.clients_file) if self.clients_file else None
        limits = limits or RateLimits(burst=math.inf)
        self.router = Router(ANY_PORT, self.keys.get("server"), admission, limits)
        self.arrived: queue.Queue[Result] = queue.Queue()  # results, as the cohort yields them
        self._stopping = threading.Event()
        self._closing: Future[None] | None = None
        self._folder = TemporaryDirectory()
        self.spool = spool or Path(self._folder.name)
        self._cohort = make_cohort(
            self.router,
            self.spool,
            should_stop=self._stopping.is_set,
            next_round=next_round,
            **({"min_clients": len(names)} | terms),
        )
        self._thread = ThreadPoolExecutor(1)
        self._devices: list[ScriptedDevice] = []

    def device(self, name: str, **link: Any) -> ScriptedDevice:
        """A device that has not said hello. link: other keys than its own."""
        own = {"keys": self.keys.get(name)}
        if server := self.keys.get("server"):
            own["server_key"] = server.public  # type: ignore[assignment]
        device = ScriptedDevice(self.router.endpoint, name, **(own | link))
        self._devices.append(device)
        return device

    def gather(self) -> list[ScriptedDevice]:
        """All the devices that have names here, joined and ready."""
        clients = self.clients()
        devices = [self.device(name) for name in self.names]
        for device in devices:
            device.join()
        assert [client.id for client in clients.result(WAIT_S)] == sorted(self.names)
        return devices

    def ask(self, question: Callable[[ZmqCohort], T]) -> Future[T]:
        """Anything, in the cohort's thread."""
        return self._thread.submit(question, self._cohort)

    def clients(self) -> Future[Sequence[Client]]:
        return self.ask(lambda cohort: cohort.clients())

    def train(
        self,
        work: Mapping[str, Assignment],
        round: int = 1,
        deadline_s: float = 0.0,
        pause: Callable[[], object] = lambda: None,
    ) -> Future[list[Result]]:
        """A round. pause: what the caller does with each result before it asks for the next."""

        def all_results(cohort: ZmqCohort) -> list[Result]:
            results = []
            for result in cohort.train(work, round, deadline_s):
                self.arrived.put(result)
                results.append(result)
                pause()
            return results

        return self.ask(all_results)

    def begin_close(self, reason: str, *, is_final: bool = False) -> Future[None]:
        """Whatever is under way is stopped."""
        if self._closing is None:
            self._stopping.set()
            self._closing = self.ask(lambda cohort: cohort.close(reason, is_final=is_final))
        return self._closing

    def close(self, reason: str = "test over", *, is_final: bool = False) -> None:
        self.begin_close(reason, is_final=is_final).result(WAIT_S)
        self._thread.shutdown()
        self._folder.cleanup()

    def close_devices(self) -> None:
        for device in self._devices:
            device.close()
