"""Who is connected: one live link per client, whoever it was before and wherever it comes from.

A client is its key, not its connection. One that comes back takes its place at once; of two live
devices with one key the one that was there stays, and the other is told. Where names are only
claimed (--insecure), no more than MAX_CLIENTS may be: what is kept of each stays for the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from coordinator.cohorts.base import Client, Offer
from coordinator.config import RunConfig
from coordinator.fleet.counters import MAX_CLIENTS, Counters
from coordinator.fleet.declared import plausible_hello
from coordinator.fleet.offered import Offered
from coordinator.links.rate_limit import Repeats
from coordinator.links.router import (
    NO_KEY,
    NOT_ADMITTED,
    Outcast,
    Received,
    Refused,
    Router,
)
from edge_sdk.data.contract import names_digest, unlike_run
from edge_sdk.errors import CapacityError
from edge_sdk.helpers.logs import event
from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Bye,
    Fault,
    Hello,
    Message,
    Probe,
    Ready,
    Welcome,
)

log = logging.getLogger(__name__)
SILENCE_S = 45.0  # a device that says nothing for so long is gone, unless a part is on its way
PROBE_S = 3.0  # in which the device that was there first must answer


def welcome_of(config: RunConfig, offer: Offer, run: str, heartbeat_s: float) -> Welcome:
    """What every device of a run is answered. offer: of the run's method."""
    return Welcome(
        protocol=PROTOCOL,
        run=run,
        model=offer.model,
        plan=offer.plan,
        variants=offer.variants,
        deadline_s=config.deadline_s,
        heartbeat_s=heartbeat_s,
        scaling=config.trained_on.scaling,
        class_names=names_digest(config.trained_on.class_names),
    )


def trains(ready: Ready) -> str:
    """What a device can train, for people."""
    return f"variant {ready.variant}" if ready.variant else f"up to exit {ready.exit}"


@dataclass
class Session:
    """One client's live link. ready: what it can train; None while it must say so anew. rival: the
    hello of another program with its name, since when. Times are of time.monotonic()."""

    route: bytes
    hello: Hello
    seen: float
    peer: Hashable = b""  # whose bucket its messages are paid from
    address: str = ""
    ready: Ready | None = None
    rival: Received | None = None
    rival_since: float = 0.0


@dataclass(frozen=True)
class Gone:
    """A client has no link any more. may_return: with the job that it has in hand."""

    name: str
    why: str
    may_return: bool = True


class Sessions:
    """The live links by client. What happens to one is returned, as a Gone or, of a device that has
    its place now, its Hello: whoever holds the jobs wants to know. class_names: the run's."""

    def __init__(
        self,
        router: Router,
        welcome: Welcome,
        counters: Counters,
        class_names: Sequence[str] = (),
    ) -> None:
        self._router = router
        self._welcome = welcome
        self._class_names = class_names
        self.offered = Offered(welcome)
        self._known = welcome  # of the run's own data; what lacks there the first device tells
        self._counters = counters
        self._names: dict[bytes, str] = {}
        router.is_session = lambda route: self.on_route(route) is not None
        self.all: dict[str, Session] = {}
        self.ready: set[str] = set()  # who could train something
        self.repeats = Repeats()  # of lines about one client

    def on_route(self, route: bytes) -> tuple[str, Session] | None:
        """The client whose live link has this route, and the link; None for any other route."""
        name = self._names.get(route)
        session = self.all.get(name) if name else None
        return (name, session) if name and session and session.route == route else None

    def send(self, name: str, message: Message, payload: Payload | None = None) -> bool:
        session = self.all.get(name)
        if session is None or not self._router.send(session.route, message, payload):
            return False
        self._router.limits.earn(session.peer, message)
        return True

    def refuse(self, route: bytes, code: str, detail: str) -> None:
        """Answer with a Fault that is not about a round."""
        self._counters.count_fault(self._names.get(route), code)
        log.debug("fault to a device: %s: %s", code, detail, extra=event("refused", code=code))
        self._router.send(route, Fault(code=code, detail=detail))

    def lacking(self) -> str:
        """Why devices that were heard of take no part; behind what is said of too few."""
        strangers = self._router.num_refused
        keys = f"; connections refused for an unknown key: {strangers}" if strangers else ""
        return f"{self._router.unfit.in_words()}{keys}"

    def log_ready(self, name: str, ready: Ready) -> None:
        """Log what a device says that it can train, before set_ready, if that is news."""
        before, unfit = self.all[name].ready, self._router.unfit
        if ready.exit:
            unfit.forget(name)
        elif not unfit.note(name, CapacityError.code, ready.reason or "it can train nothing"):
            return
        now = ready.exit, ready.variant
        if not ready.exit or before is None or (before.exit, before.variant) != now:
            what = f"trains {trains(ready)}" if ready.exit else "can train nothing now"
            extra = event("ready", client=name, exit=ready.exit)
            if (behind := self.repeats.note("ready", name)) is not None:
                why = f" ({ready.reason})" if ready.reason else ""
                log.info("%s %s%s%s", name, what, why, behind, extra=extra)

    def _turn_away(self, received: Received, name: str, code: str, detail: str) -> None:
        """Refuse a hello."""
        if self._router.unfit.note(name, code, detail):
            extra = event("refused", client=name, code=code, address=received.address)
            log.warning("%s is refused, %s: %s", name, code, detail, extra=extra)
        self.refuse(received.route, code, detail)

    def ready_clients(self) -> list[Client]:
        """The clients that have said what they can train, if they can train anything; by name."""
        return [
            Client(
                id=name,
                exit=session.ready.exit,
                stages=session.ready.stages,
                prefix_s=session.ready.prefix_s,
                stage_s=session.ready.stage_s,
                num_examples=session.hello.num_examples,
                profile=session.hello.profile,
                variant=session.ready.variant,
                num_weights=session.ready.num_weights,
            )
            for name in sorted(self.ready)
            if (session := self.all[name]).ready is not None
        ]

    def set_ready(self, name: str, ready: Ready | None) -> None:
        """Note what a device can train now; None if it must say so anew."""
        if session := self.all.get(name):
            session.ready = ready
            if ready is not None and ready.exit > 0:
                self.ready.add(name)
            else:
                self.ready.discard(name)

    def on_hello(self, received: Received, hello: Hello) -> Hello | None:
        """Give a device its place, unless it may not have it, has it, or another live one does. The
        hello if it has it anew."""
        route, name = received.route, hello.client_id
        known = received.name or self._names.get(route, name)
        if known != name:
            said = f"this is {known!r}, hello says {name!r}"
            self._turn_away(received, known, "admission", said)
            return None
        unlike = unlike_run(hello, self._known, name, self._class_names)
        if unlike and unlike.is_certain:
            self._turn_away(received, name, "data", unlike.text)
            return None
        counted = self._counters.clients
        if received.name is None and name not in counted and len(counted) >= MAX_CLIENTS:
            detail = f"{MAX_CLIENTS} names have joined without keys, and no more may"
            self._turn_away(received, name, "admission", detail)
            return None
        old = self.all.get(name)
        if old and old.route == route and old.hello.session == hello.session:
            self.send(name, self._welcome)  # said again before it was answered: nothing was lost
            return None
        if old and old.route != route and old.hello.session != hello.session:
            if old.rival is not None:  # which hears of it when it is known who is there
                self._on_third(old, received, hello)
                return None
            if self._router.send(old.route, Probe()):  # may be a link that is dead without a sign
                old.rival, old.rival_since = received, time.monotonic()
                return None
        return self._place(received, hello)

    def _on_third(self, session: Session, received: Received, hello: Hello) -> None:
        """While two devices claim a place: the second again, or a third, which hears so at once."""
        rival = session.rival
        assert rival is not None
        assert isinstance(rival.message, Hello)
        if rival.message.session == hello.session:
            session.rival = received
            return
        self._counters.of(hello.client_id).duplicates += 1
        detail = f"two other devices with the key of {hello.client_id!r} are connected already"
        self.refuse(received.route, "duplicate", f"{detail}; every device needs a key of its own")

    def forgive_pause(self, seconds: float) -> None:
        """The coordinator did not listen for so long: that is no device's silence."""
        for session in self.all.values():
            session.seen += seconds
            session.rival_since += seconds

    def check_links(self, now: float, patience_s: Mapping[str, float]) -> list[Hello | Gone]:
        """See after devices that are silent, whose key was revoked, or whose place another claims.
        patience_s: by client, how long it may say nothing because a part is on its way."""
        happened: list[Hello | Gone] = []
        for name, session in list(self.all.items()):
            if not self._router.is_admitted(name):
                self.refuse(session.route, "admission", NOT_ADMITTED)
                happened.append(self.leave(name, NO_KEY, may_return=False))
            elif session.rival is not None:
                if hello := self._settle(name, session, now, patience_s.get(name, 0.0)):
                    happened.append(hello)
            elif now - session.seen > max(SILENCE_S, patience_s.get(name, 0.0)):
                happened.append(self.leave(name, f"said nothing for {now - session.seen:.0f} s"))
        return happened

    def on_outcast(self, outcast: Outcast) -> Gone | None:
        """Somebody who may not be heard said something over this route: whoever's link it is loses
        it."""
        if (found := self.on_route(outcast.route)) is None:
            return None
        self._counters.count_fault(found[0], outcast.code)
        return self.leave(found[0], outcast.why, may_return=outcast.may_return)

    def on_refused(self, refused: Refused) -> None:
        """Count a frame that was answered with a fault."""
        self._counters.count_fault(self._names.get(refused.route), refused.code)

    def leave(self, name: str, why: str, *, may_return: bool = True) -> Gone:
        session = self.all.pop(name)
        self.ready.discard(name)
        self._names.pop(session.route, None)
        self._counters.of(name).seen = session.seen
        if (behind := self.repeats.note("gone", name)) is not None:
            log.info("%s is gone: %s%s", name, why, behind, extra=event("gone", client=name))
        return Gone(name, why, may_return)

    def take_leave(self, bye: Bye, seconds: float) -> None:
        """Tell every device, and wait for its answer at most so long: ZeroMQ drops what a device
        has not read when the connection ends."""
        for name in self.all:
            self.send(name, bye)
        until = time.monotonic() + seconds
        while self.all and time.monotonic() < until:
            _, received = self._router.receive(100)
            if not isinstance(received, Received) or not isinstance(received.message, Bye):
                continue
            if found := self.on_route(received.route):
                self.all.pop(found[0])

    def _settle(self, name: str, session: Session, now: float, patience_s: float) -> Hello | None:
        """Decide who keeps a place that two devices claim, once the first has answered or was given
        time to. The hello of the second if it has the place now."""
        rival = session.rival
        assert rival is not None
        if session.seen > session.rival_since:
            detail = (
                f"another device with the key of {name!r} is connected from "
                f"{session.address or '?'}; every device needs a key of its own"
            )
            where = rival.address or "?"
            extra = event("duplicate", client=name, address=where)
            if (behind := self.repeats.note("duplicate", name)) is not None:
                log.warning("%s, asked from %s%s", detail, where, behind, extra=extra)
            session.rival = None
            self._counters.of(name).duplicates += 1
            self.refuse(rival.route, "duplicate", detail)
        elif now - session.rival_since > max(PROBE_S, patience_s):
            session.rival = None
            assert isinstance(rival.message, Hello)
            if self._router.is_still(rival):
                return self._place(rival, rival.message)
            self.refuse(rival.route, "admission", NOT_ADMITTED)
        return None

    def _place(self, received: Received, hello: Hello) -> Hello:
        hello = plausible_hello(hello)
        name, old = hello.client_id, self.all.get(hello.client_id)
        if old is not None:
            self._names.pop(old.route, None)
        is_same = old is not None and old.hello.session == hello.session
        ready = old.ready if old is not None and is_same else None
        self._names[received.route] = name
        self.all[name] = Session(
            received.route, hello, time.monotonic(), received.peer, received.address
        )
        self.set_ready(name, ready)
        self._note_data(hello, is_same)
        platform, counts = hello.profile.platform, self._counters.of(name)
        counts.address, counts.platform = received.address, platform
        extra = event("back" if is_same else "joined", client=name, address=received.address)
        said = "%s is back from %s%s" if is_same else "%s joined from %s%s"
        if (behind := self.repeats.note("joined", name)) is not None:
            log.info(said, name, platform, behind, extra=extra)
        self.send(name, self._welcome)
        return hello

    def _note_data(self, hello: Hello, is_same: bool) -> None:
        """Tell a doubt about a device's data. What the run does not know, as without a test set,
        is taken from the first device that says it; as that one is no more right than the others,
        nobody is refused for it."""
        self._welcome = replace(
            self._welcome,
            scaling=self._welcome.scaling or hello.scaling,
            class_names=self._welcome.class_names or hello.class_names,
        )
        unlike = unlike_run(hello, self._welcome, hello.client_id, self._class_names)
        if not unlike or is_same:
            return
        if (behind := self.repeats.note("unlike", hello.client_id)) is not None:
            log.warning("%s%s", unlike.text, behind)
