"""Messages and sequences of them, good and spoilt, in a real round, and what the checks notice; the
same as tools.fuzz, which makes a million of them, in small."""

from __future__ import annotations

import logging
import queue
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from coordinator.links import router
from edge_sdk.protocol.codec import encode
from edge_sdk.protocol.messages import Accepted, Fault, Fetch, Message, Part
from tests.support.mutations import FEW, MORE, mutate_bytes, numbers
from tools.fuzz import __main__ as fuzz
from tools.fuzz.fakes import SENDERS, Broken, OneLine, Socket, small_world
from tools.fuzz.inputs import (
    frames_of,
    messages_of,
    mutate_acts,
    mutate_frame,
    pack_acts,
    seeds_of_handler,
    unpack_acts,
)
from tools.fuzz.messages import drawn_frames, strategies
from tools.fuzz.state import changes, is_owned, snapshot_state
from tools.fuzz.targets import decode_one, handler_one
from tools.fuzz.world import ROUND, Act, Seen, World, job_of, make_hello, make_update

REGRESSIONS = Path(__file__).parents[1] / "fuzz" / "regressions"


# -- the coordinator ---------------------------------------------------------------------------


@pytest.fixture
def world():
    """Inside, worlds can be made; what they log is checked too."""
    logger, lines = logging.getLogger(), OneLine()
    logger.addHandler(lines)
    try:
        with small_world():
            yield
    finally:
        logger.removeHandler(lines)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("place", range(len(SENDERS)), ids=SENDERS)
def test_what_a_device_may_say_in_any_state(place):
    for route in (2 * place, 2 * place + 1):
        for message in messages_of(SENDERS[place]):
            World().play([(route, frames_of(SENDERS[place], message))])


@pytest.mark.usefixtures("world")
def test_devices_that_do_what_is_expected_of_them_are_counted():
    seen = Seen()
    for data in seeds_of_handler():
        handler_one(data, seen)
    # told, training, uploading, each on its connection, on a new one, after a lost answer
    assert seen.updates == 9


@pytest.mark.usefixtures("world")
def test_spoilt_messages_in_the_middle_of_a_round():
    pool, seeds = drawn_frames(20, 2), seeds_of_handler()

    @MORE
    @given(st.sampled_from(seeds), numbers, st.integers(1, 8))
    def check(data: bytes, rng: random.Random, num_changes: int) -> None:
        for _ in range(num_changes):
            data = mutate_acts(data, rng, lambda d, most: mutate_bytes(d, most, rng), pool)
        handler_one(data, Seen())

    check()


class Talk:
    """A round that waits for what is said next, in a thread of its own."""

    def __init__(self) -> None:
        self._world = World()
        self._acts: queue.Queue[Act | None] = queue.Queue()
        self._told: queue.Queue[list[Message] | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._play)
        self._thread.start()
        self._answers()

    def say(self, route: int, frames: list[bytes]) -> list[Message]:
        """What is answered."""
        self._acts.put((route, frames))
        return self._answers()

    def end(self) -> None:
        """The waiting device finishes, and what counted is looked at."""
        self._acts.put(None)
        self._answers()
        self._thread.join()

    def _answers(self) -> list[Message]:
        told = self._told.get(timeout=60)
        if isinstance(told, BaseException):
            self._thread.join()
            raise told
        return told

    def _play(self) -> None:
        try:
            self._world.play(self._listen())
        except BaseException as error:
            self._told.put(error)
        else:
            self._told.put([])

    def _listen(self):
        while True:
            self._told.put([message for _, message in self._world.socket.sent])
            act = self._acts.get(timeout=60)
            if act is None:
                return
            yield act


class Devices(RuleBasedStateMachine):
    """Any device says anything at any time; some then do what they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = Talk()
        self.wanted: dict[int, Fetch] = {}  # route to what it was asked for
        self.is_broken = False

    def say(self, route: int, frames: list[bytes]) -> None:
        try:
            answers = self.talk.say(route, frames)
        except BaseException:
            self.is_broken = True
            raise
        for answer in answers:
            if isinstance(answer, Fetch):
                self.wanted[route] = answer
            elif isinstance(answer, Accepted | Fault):
                self.wanted.pop(route, None)

    @rule(route=st.integers(0, 13), message=st.one_of(list(strategies().values())))
    def says_anything(self, route: int, message: Message) -> None:
        self.say(route, [encode(message)] + [b"raw"] * isinstance(message, Part))

    @rule(route=st.integers(0, 13), data=st.data())
    def says_what_could_be_meant(self, route: int, data: st.DataObject) -> None:
        name = SENDERS[route // 2]
        message = data.draw(st.sampled_from(messages_of(name)))
        self.say(route, frames_of(name, message))

    @rule(route=st.integers(0, 13), rng=numbers, data=st.data())
    def says_it_badly(self, route: int, rng: random.Random, data: st.DataObject) -> None:
        message = data.draw(st.sampled_from(messages_of(SENDERS[route // 2])))
        self.say(route, [mutate_frame(encode(message), rng, mutate_bytes)])

    @rule(route=st.integers(4, 9))
    def comes_back_and_announces(self, route: int) -> None:
        name = SENDERS[route // 2]
        self.say(route, [encode(make_hello(name, round=ROUND, job=job_of(name).id))])
        self.say(route, [encode(make_update(name))])

    @rule(steps=st.integers(0, 7))
    def time_passes(self, steps: int) -> None:
        self.say(steps, [])

    @precondition(lambda self: self.wanted)
    @rule()
    def uploads(self) -> None:
        route, fetch = self.wanted.popitem()
        for index in range(fetch.first, fetch.first + fetch.count):
            part = Part(round=ROUND, index=index)
            self.say(route, frames_of(SENDERS[route // 2], part))

    def teardown(self) -> None:
        if not self.is_broken:
            self.talk.end()


@pytest.mark.usefixtures("world")
def test_devices_that_say_anything_in_any_order():
    run_state_machine_as_test(Devices, settings=settings(FEW, stateful_step_count=15))


@pytest.mark.usefixtures("world")
def test_memory_does_not_grow_with_messages():
    """The objects that one coordinator holds after two rounds of inputs and after eight."""
    seen = Seen()
    one = World(is_judged=False, seen=seen)
    acts = [act for data in seeds_of_handler() for act in unpack_acts(data)]
    sizes = []
    for played in range(8):
        one.play(acts)
        if played in (1, 7):
            sizes.append(len(snapshot_state(one.cohort, ["_router", "_spool"])))
    assert seen.inputs == 8 * len(acts)
    assert sizes[1] - sizes[0] < 6 * 5  # a count may take more bytes; one route a round is more


# -- what the checks notice --------------------------------------------------------------------


@pytest.mark.usefixtures("world")
def test_what_a_coordinator_lets_out_is_noticed(monkeypatch):
    def fails(frames: object) -> None:
        raise KeyError("a field that nobody looked for")

    acts = [(0, [b"x"])]
    parse = router.parse_frames
    monkeypatch.setattr(
        router, "parse_frames", lambda frames: (fails if frames[0].bytes == b"x" else parse)(frames)
    )
    with pytest.raises(KeyError):
        World().play(acts)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("frame", "place", "complaint"),
    [
        (b"x", "surprise", "refused, and yet"),  # a refused message changes something
        (encode(make_hello("idle")), "told", "not its own"),  # a good one what is another's
    ],
)
def test_a_change_of_state_is_noticed(monkeypatch, frame, place, complaint):
    world = World()
    send = Socket.send_multipart

    def sends(self: Socket, frames: list[bytes], *args: Any, **more: Any) -> None:
        if world._sender == "idle":
            world.cohort.noted = {place: 1}  # type: ignore[attr-defined]
        send(self, frames, *args, **more)

    monkeypatch.setattr(Socket, "send_multipart", sends)
    with pytest.raises(Broken, match=complaint):
        world.play([(2, [frame])])


@pytest.mark.usefixtures("world")
def test_an_update_that_is_not_what_was_sent_is_noticed(monkeypatch):
    world = World()
    check = world._check_results

    def spoils() -> None:
        result = next(r for r in world.results if r.client.id == "honest")
        result.tensors["exits.0.bias"] += 1
        check()

    monkeypatch.setattr(world, "_check_results", spoils)
    with pytest.raises(Broken, match="or not as it was sent"):
        world.play([])


def test_a_line_that_a_peer_broke_is_noticed():
    with pytest.raises(Broken):
        OneLine().emit(logging.LogRecord("x", 30, "x", 1, "from %s", ("a\nb",), None))


def test_states_that_are_equal_look_equal():
    class Thing:
        def __init__(self, **values: Any) -> None:
            self.__dict__.update(values)

    Thing.__module__ = "coordinator.thing"
    before = snapshot_state(Thing(at={"b": [1.5, 7]}, of={b"a 0": "a"}, busy=1), ["busy"])
    same = snapshot_state(Thing(at={"b": [1.5, 7]}, of={b"a 0": "a"}, busy=2), ["busy"])
    other = snapshot_state(Thing(at={"b": [1.5, 8]}, of={b"a 1": "a"}, busy=1), ["busy"])
    assert changes(before, same) == {}
    found = changes(before, other)
    assert found == {
        ("at", "b", 1): (7, 8),
        ("of", b"a 0"): ("a", "(nothing)"),
        ("of", b"a 1"): ("(nothing)", "a"),
    }
    assert [p for p, pair in found.items() if is_owned(p, pair, ("a", b"a 0", b"a 1"))] == [
        ("of", b"a 0"),
        ("of", b"a 1"),
    ]


# -- what was found ----------------------------------------------------------------------------


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*.bin")), ids=lambda path: path.stem)
def test_inputs_that_once_failed(path):
    data = path.read_bytes()
    if path.name.startswith("decode-"):
        decode_one(data)
    else:
        handler_one(data, Seen())


def test_sequences_are_read_as_they_were_written():
    acts: list[Act] = [(3, [b"a", b"b"]), (27, [b""])]
    assert unpack_acts(pack_acts(acts)) == acts
    assert unpack_acts(pack_acts([(5, [])])) == [(5, [])]  # time passes
    assert unpack_acts(b"\xc1garbage") == [(8, [b"\xc1garbage"])]  # whatever it is, it is a frame


def test_growth_is_told_apart_from_noise():
    told = {"rss_mb_10k": 200.0, "rss_mb_110k": 203.9, "objects_10k": 10, "objects_110k": 210}
    assert fuzz.growth(told) == []
    assert "rss_mb from 200.0 to 204.1" in fuzz.growth(told | {"rss_mb_110k": 204.1})[0]
    assert "objects from 10 to 211" in fuzz.growth(told | {"objects_110k": 211})[0]
