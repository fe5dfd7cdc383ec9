"""What a coordinator may do to a client, one function each; what the client must do then is in
docs/protocol.md. Each begins with a client that is ready for a job, and leaves it so if its program
still runs; else that is started again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

from msgspec.structs import replace

from edge_sdk.protocol.messages import (
    PROTOCOL,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Probe,
    Ready,
    Update,
)
from edge_sdk.protocol.tensors import Receiver
from tools.conformance import job_scenarios as jobs
from tools.conformance.bed import (
    HEARTBEAT_S,
    PLAN,
    WINDOW,
    Bed,
    Failed,
    check,
)
from tools.conformance.job_scenarios import LONG, drop, finish, take_update

Scenario: TypeAlias = Callable[[Bed], None]
AT_ONCE_S = 3.0  # in which a probe must be answered


# -- the session ------------------------------------------------------------------------------


def hello_is_repeated(bed: Bed) -> None:
    """hello comes again, in the same session, until it is answered; then ready and heartbeats."""
    bed.stop()
    bed.start()
    first = bed.wait_for(Hello)
    again = bed.expect(Hello, within_s=10)
    check(first.session == again.session, "another session in the repeated hello")
    check((first.round, first.job) == (0, None), "a job in hand at the start of its program")
    bed.hello = again
    bed.welcome()
    bed.wait_ready()
    before, until = bed.num_heartbeats, time.monotonic() + 4 * HEARTBEAT_S
    while bed.receive(until):
        pass
    said = bed.num_heartbeats - before
    check(2 <= said <= 8, f"{said} heartbeats in {4 * HEARTBEAT_S:g} s of {HEARTBEAT_S:g} s each")


def hello_on_request(bed: Bed) -> None:
    """The fault `hello` is answered with hello at once, and what the client was doing goes on."""
    given = bed.give()
    bed.expect(Fetch)
    bed.send(Fault(code="hello", detail="say hello first"))
    bed.hello_again(given)
    bed.wait_for(Ready)
    finish(bed, given)


def welcomed_twice(bed: Bed) -> None:
    """A second welcome changes nothing: ready, and the job goes on."""
    given = bed.give()
    bed.expect(Fetch)
    bed.welcome()
    bed.expect(Ready)
    bed.send_parts(given, range(WINDOW))
    finish(bed, given)


def probe(bed: Bed) -> None:
    """A probe is answered by a heartbeat within 3 s, also while it trains."""
    bed.heartbeat_s = 60.0
    given = bed.give(replace(PLAN, epochs=LONG))
    bed.serve_parts(given)
    bed.stays_quiet(2 * HEARTBEAT_S)
    before, until = bed.num_heartbeats, time.monotonic() + AT_ONCE_S
    bed.send(Probe())
    while bed.num_heartbeats == before:
        if bed.receive(until) is None:
            raise Failed(f"no answer to a probe for {AT_ONCE_S:g} s while it trains")
    drop(bed, given)
    bed.heartbeat_s = HEARTBEAT_S
    bed.welcome()
    bed.expect_ready()


# -- what is cut ------------------------------------------------------------------------------


def cut_without_a_job(bed: Bed) -> None:
    """After a lost connection: hello with the same session, and welcome leads to ready."""
    bed.cut()
    bed.hello_again(None)
    bed.expect(Ready)
    finish(bed, bed.give())


def cut_in_the_download(bed: Bed) -> None:
    """hello names the job; after welcome it asks on from the first part that it lacks."""
    given = bed.give()
    bed.expect(Fetch)
    bed.send_parts(given, range(3))
    bed.wait_for(Fetch, lambda fetch: fetch.have == 3)
    bed.cut()
    bed.hello_again(given)
    fetch = bed.wait_for(Fetch)
    got = (fetch.have, fetch.first, fetch.count)
    check(got == (3, 3, WINDOW), f"have, first, count {got} after a cut; expected (3, 3, 8)")
    bed.send_parts(given, range(3, 3 + WINDOW))
    finish(bed, given)


def cut_while_it_trains(bed: Bed) -> None:
    """It trains on, and is back with the job; late still ends it."""
    given = bed.give(replace(PLAN, epochs=LONG))
    bed.serve_parts(given)
    bed.cut()
    bed.hello_again(given)
    bed.wait_for(Ready)
    bed.wait_for(Heartbeat, lambda heartbeat: heartbeat.round == given.job.round)
    drop(bed, given)


def cut_in_the_upload(bed: Bed) -> None:
    """After welcome it announces the same update again, and sends the parts that lack."""
    given = bed.give()
    bed.serve_parts(given)
    update = bed.expect(Update)
    receiver = Receiver(update.tensors)
    bed.send(Fetch(round=update.round, have=0, first=0, count=1))
    _, payload = bed.next()
    receiver.add(0, bytes(payload or b""))
    bed.cut()
    bed.hello_again(given)
    again = bed.wait_for(Update)
    check((again.job, again.digest) == (update.job, update.digest), "another update after a cut")
    take_update(bed, given, again, receiver)


def restarted_coordinator(bed: Bed) -> None:
    """It is back with the same run, and gives the same job again: the client goes on with it."""
    given = bed.give()
    bed.expect(Fetch)
    bed.send_parts(given, range(2))
    bed.wait_for(Fetch, lambda fetch: fetch.have == 2)
    bed.cut()
    bed.hello_again(given)
    bed.send(given.job)
    fetch = bed.wait_for(Fetch)
    check(fetch.have == 2, f"have is {fetch.have} after the job came again; expected 2")
    bed.send_parts(given, range(2, 2 + WINDOW))
    finish(bed, given)


def another_run(bed: Bed) -> None:
    """A welcome of another run: the job is dropped, and ready follows."""
    given = bed.give()
    bed.expect(Fetch)
    bed.cut()
    bed.num_runs += 1
    bed.in_hand = None
    bed.hello_again(given)
    bed.wait_ready()
    bed.stays_quiet(2 * HEARTBEAT_S)
    finish(bed, bed.give())


def bye_and_back(bed: Bed) -> None:
    """A bye that is not final is answered; hello follows, with the job."""
    given = bed.give()
    bed.expect(Fetch)
    bed.send(Bye(reason="conformance"))
    bed.expect(Bye)
    bed.hello_again(given)
    fetch = bed.wait_for(Fetch)
    check(fetch.first == 0, f"it asks for part {fetch.first} first; expected 0")
    bed.send_parts(given, range(WINDOW))
    finish(bed, given)


def duplicate(bed: Bed) -> None:
    """The fault `duplicate` in answer to hello: hello again, later."""
    bed.cut()
    bed.wait_for(Hello)
    bed.send(Fault(code="duplicate", detail="conformance"))
    bed.hello_again(None)
    bed.expect(Ready)


# -- its program ends, or may -----------------------------------------------------------------


def started_again(bed: Bed) -> None:
    """Killed and started again: another session; it is back without the job, or with it and its
    update."""
    before = bed.hello
    given = bed.give()
    bed.serve_parts(given)
    bed.expect(Update)
    bed.stop()
    bed.start()
    bed.in_hand = None
    bed.hello = hello = bed.wait_for(Hello)
    check(before is None or hello.session != before.session, "the session of the program before")
    bed.welcome()
    if hello.job == given.job.id:
        take_update(bed, given, bed.wait_for(Update))
        return
    check((hello.round, hello.job) == (0, None), f"hello names {hello.job}, a job never given")
    bed.wait_ready()
    bed.send_job(given.job)
    finish(bed, given)


def another_version(bed: Bed) -> None:
    """A welcome of another protocol ends the program with an error."""
    bed.cut()
    bed.wait_for(Hello)
    bed.welcome(protocol=PROTOCOL + 94)
    check(bed.ends() != 0, "it ended with status 0, expected an error")


def revoked(bed: Bed) -> None:
    """The fault `admission` ends the program with an error."""
    bed.send(Fault(code="admission", detail="conformance: this key is not admitted any more"))
    check(bed.ends() != 0, "it ended with status 0, expected an error")


def final_bye(bed: Bed) -> None:
    """A final bye is answered; the program ends well, or waits for the next run without the job."""
    bed.give()
    bed.expect(Fetch)
    bed.send(Bye(is_final=True, reason="the run is over"))
    bed.wait_for(Bye)
    until = time.monotonic() + bed.patience_s
    while bed.is_running and time.monotonic() < until:
        received = bed.receive(time.monotonic() + 0.1)
        if received and isinstance(received[0], Hello):
            check(received[0].job is None, "hello names a job of a run that is over")
            return
    check(bed.ends() == 0, f"it ended with status {bed.ends()}, expected 0")


SCENARIOS: tuple[Scenario, ...] = (
    hello_is_repeated,
    hello_on_request,
    welcomed_twice,
    probe,
    jobs.trains_a_prefix,
    jobs.trains_by_adam,
    jobs.trains_one_stage,
    jobs.trains_two_segments,
    jobs.trains_in_batches,
    jobs.credit,
    jobs.upload_on_request,
    jobs.parts_unasked,
    jobs.part_of_a_wrong_size,
    jobs.job_again,
    jobs.another_job,
    jobs.late_while_it_trains,
    jobs.late_while_it_uploads,
    jobs.faults_about_nothing,
    jobs.bad_jobs,
    jobs.variants,
    jobs.bad_frames,
    cut_without_a_job,
    cut_in_the_download,
    cut_while_it_trains,
    cut_in_the_upload,
    restarted_coordinator,
    another_run,
    bye_and_back,
    duplicate,
    started_again,
    another_version,
    revoked,
    final_bye,
)
