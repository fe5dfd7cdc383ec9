"""What a coordinator may do with a job; see scenarios.py."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from edge_sdk.protocol.messages import (
    Accepted,
    Fault,
    Fetch,
    Job,
    ModelSpec,
    Part,
    Plan,
    Ready,
    Segment,
    Update,
)
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import Receiver, Sender
from tools.conformance.bad_frames import bad_frames_for_a_device
from tools.conformance.bed import (
    HEARTBEAT_S,
    NUM_EXAMPLES,
    PLAN,
    WINDOW,
    Bed,
    Given,
    check,
    in_short,
)
from tools.conformance.results import check_announced, check_arrived, check_trained

LONG = 1500  # epochs that take seconds at least


def finish(bed: Bed, given: Given) -> None:
    """The client has the job: serve what parts it lacks, take its update, accept it."""
    bed.serve_parts(given)
    take_update(bed, given, bed.expect(Update))


def take_update(bed: Bed, given: Given, update: Update, receiver: Receiver | None = None) -> None:
    check_announced(bed, given, update)
    receiver = receiver or Receiver(update.tensors)
    bed.ask_parts(update, receiver)
    check_arrived(given, update, receiver)
    if bed.hello is not None and bed.hello.num_examples == NUM_EXAMPLES:
        check_trained(bed, given, update, receiver.tensors())
    bed.send(Accepted(round=update.round))
    bed.expect_ready()


def drop(bed: Bed, given: Given, code: str = "late") -> None:
    """End the job in hand by a fault: the client says ready, and nothing about the job any more."""
    bed.send(Fault(code=code, detail="conformance", round=given.job.round))
    bed.wait_ready()
    bed.stays_quiet(2 * HEARTBEAT_S)


def trains_a_prefix(bed: Bed) -> None:
    """One step of sgd on all stages: the update's list, digest, figures, and values."""
    plan = replace(PLAN, optimizer="sgd", lr=0.1)
    finish(bed, bed.give(plan))


def trains_by_adam(bed: Bed) -> None:
    """Three epochs of adam, exits weighted."""
    finish(bed, bed.give(replace(PLAN, epochs=3, lr=0.01, exit_weights=(0.5, 2.0))))


def trains_one_stage(bed: Bed) -> None:
    """Stage 2 over a frozen stage 1, momentum: exit 1 is not sent, stage 1 does not come back."""
    plan = replace(PLAN, segments=(Segment(first=2, last=2),), epochs=3)
    finish(bed, bed.give(replace(plan, optimizer="sgd", lr=0.05, momentum=0.9)))


def trains_two_segments(bed: Bed) -> None:
    """Both stages apart: the deeper one sees stage 1 as it was received."""
    apart = (Segment(first=1, last=1), Segment(first=2, last=2))
    finish(bed, bed.give(replace(PLAN, segments=apart, epochs=2, optimizer="sgd", lr=0.1)))


def trains_in_batches(bed: Bed) -> None:
    """Batches of 11 of 24 examples, two epochs: the rest of 2 is left out, so 4 steps."""
    finish(bed, bed.give(replace(PLAN, batch_size=11, epochs=2)))


def credit(bed: Bed) -> None:
    """It asks for 8 parts, for more when at most 4 are under way, and tells every part."""
    given = bed.give()
    num_parts, fake = given.sender.num_parts, Receiver(given.job.tensors)
    for have in range(num_parts + 1):
        fetch = bed.expect(Fetch)
        first, count = fake.next_request(WINDOW) or (fetch.first, 0)
        wanted = Fetch(round=given.job.round, have=have, first=first, count=count)
        check(fetch == wanted, f"with {have} parts: got {fetch}, expected {wanted}")
        if have < num_parts:
            bed.send_parts(given, [have])
            fake.add(have, given.sender.part(have))
    take_update(bed, given, bed.expect(Update))


def upload_on_request(bed: Bed) -> None:
    """Of an update it sends what is asked for: again, from the end, none beyond it, none for 0."""
    given = bed.give()
    bed.serve_parts(given)
    update, number = bed.expect(Update), given.job.round
    bed.stays_quiet()
    last = given.sender.num_parts - 1
    for first, count, wanted in ((0, 1, [0]), (0, 1, [0]), (last, 5, [last]), (last + 1, 3, [])):
        bed.send(Fetch(round=number, have=0, first=first, count=count))
        for index in wanted:
            message, _ = bed.next()
            check(message == Part(round=number, index=index), f"expected part {index}: {message}")
    bed.send(Fetch(round=number, have=0, first=0, count=0))
    bed.send(Fetch(round=number + 1, have=0, first=0, count=1))  # of a job that it has not got
    bed.stays_quiet()
    take_update(bed, given, update)


def parts_unasked(bed: Bed) -> None:
    """A part again, one that was not asked for, one of another round: ignored."""
    given = bed.give()
    bed.expect(Fetch)
    number, last = given.job.round, given.sender.num_parts - 1
    bed.send_parts(given, [0])
    check(bed.expect(Fetch).have == 1, "a part is not counted in `have`")
    bed.send_parts(given, [0])
    bed.send(Part(round=number, index=last), given.sender.part(last))
    bed.send(Part(round=number + 1, index=1), given.sender.part(1))
    bed.send_parts(given, range(1, WINDOW))
    fetch = bed.wait_for(Fetch, lambda fetch: fetch.have == WINDOW)
    check(fetch.have == WINDOW, "a part that came again or unasked is counted")
    bed.send_parts(given, range(WINDOW, last + 1))
    bed.wait_for(Fetch, lambda fetch: fetch.have == last + 1)
    take_update(bed, given, bed.expect(Update))


def part_of_a_wrong_size(bed: Bed) -> None:
    """The fault `protocol` with the job's round, or it is passed over; another job goes well."""
    given = bed.give()
    bed.expect(Fetch)
    bed.send(Part(round=given.job.round, index=0), bytes(PART_BYTES - 4))
    fault = bed.expect(Fault)
    wanted = ("protocol", given.job.round)
    check((fault.code, fault.round) == wanted, f"got {fault}, expected code and round {wanted}")
    bed.expect_ready()
    finish(bed, bed.give())


def job_again(bed: Bed) -> None:
    """The same job again: it goes on in the download, and tells its update again."""
    given = bed.give()
    bed.expect(Fetch)
    bed.send_parts(given, range(3))
    bed.wait_for(Fetch, lambda fetch: fetch.have == 3)
    bed.send(given.job)
    fetch = bed.expect(Fetch)
    got = (fetch.have, fetch.first)
    check(got == (3, 3), f"have, first {got} after the job came again; expected (3, 3)")
    bed.send_parts(given, range(3, 3 + WINDOW))
    bed.serve_parts(given)
    update = bed.expect(Update)
    bed.send(given.job)
    again = bed.expect(Update)
    check(again.digest == update.digest, "another digest when the job came again")
    take_update(bed, given, again)


def another_job(bed: Bed) -> None:
    """Another job ends the one in hand without a word about it."""
    first = bed.give()
    bed.expect(Fetch)
    second = bed.give()
    bed.wait_for(Fetch, lambda fetch: fetch.round == second.job.round)
    bed.send_parts(first, [0])  # of the job before: passed over
    bed.send_parts(second, range(WINDOW))
    finish(bed, second)


def late_while_it_trains(bed: Bed) -> None:
    """The fault `late` ends the job in the middle of training."""
    given = bed.give(replace(PLAN, epochs=LONG))
    bed.serve_parts(given)
    drop(bed, given)
    finish(bed, bed.give())


def late_while_it_uploads(bed: Bed) -> None:
    given = bed.give()
    bed.serve_parts(given)
    update = bed.expect(Update)
    bed.send(Fetch(round=update.round, have=0, first=0, count=1))
    bed.expect(Part)
    drop(bed, given)
    bed.send(Fetch(round=update.round, have=1, first=1, count=1))
    bed.stays_quiet()


def faults_about_nothing(bed: Bed) -> None:
    """A fault about a round that it has no job of: ready. One of an unknown code and round 0:
    nothing."""
    bed.send(Fault(code="round", detail="conformance", round=bed.num_jobs + 7))
    bed.expect(Ready)
    bed.send(Fault(code="conformance", detail="an unknown code"))
    bed.stays_quiet()


def bad_jobs(bed: Bed) -> None:
    """A job beyond the model, of another model, of a family that nobody knows, without a tensor or
    with NaN is refused with its round, and ready follows."""
    deeper = replace(PLAN, segments=(Segment(first=1, last=3),))
    cases: dict[str, Callable[[Job], Job]] = {
        "beyond the model": lambda job: replace(job, plan=deeper),
        "of another model": lambda job: replace(job, model=replace(job.model, num_classes=5)),
        "of a family that nobody knows": lambda job: replace(
            job, model=replace(job.model, family="conformance")
        ),
        "without a tensor": lambda job: job,
        "with NaN": lambda job: job,
    }
    for what, spoilt in cases.items():
        given = bed.make_job()
        tensors = dict(given.tensors)
        if what == "without a tensor":
            del tensors["stages.0.1.weight"]
        if what == "with NaN":
            tensors["stages.0.1.weight"] = tensors["stages.0.1.weight"] * float("nan")
        sender = Sender(tensors)
        job = spoilt(replace(given.job, tensors=sender.specs))
        bed.note(f"a job {what}")
        bed.send_job(job)
        message, _ = bed.next()
        while isinstance(message, Fetch):  # it may look at a job when it has all of it
            end = min(message.first + message.count, sender.num_parts)
            bed.send_parts(Given(job, sender, tensors), range(message.first, end))
            message, _ = bed.next()
        is_refused = isinstance(message, Fault) and message.round == job.round
        check(is_refused, f"a job {what}: got {in_short(message)}, expected a fault of its round")
        bed.expect_ready()


def variants(bed: Bed) -> None:
    """It chooses one of the welcome's variants, or rests; trains that and the smaller one, each as
    one segment with tensors of its own; and refuses what is none of them."""
    offered = [replace(bed.model, exit=1), replace(bed.model, width=0.5), bed.model]
    bed.welcome(variants=tuple(offered))
    ready = bed.expect(Ready)
    if ready.exit or ready.variant:
        check(
            0 < ready.variant <= 3, f"ready names variant {ready.variant} of 3, exit {ready.exit}"
        )
        exit = offered[ready.variant - 1].exit
        wanted = f"variant {ready.variant} has exit {exit}"
        check(ready.exit == exit, f"ready names exit {ready.exit}, {wanted}")
        check(not ready.stages, f"ready names stages {ready.stages} beside a variant")
        bed.in_hand, bed.is_free = 0, True
        for model in (offered[ready.variant - 1], offered[0]):
            given = bed.make_job(_all_of(model), model)
            bed.send_job(given.job)
            finish(bed, given)
        strange = replace(bed.model, width=0.75)
        given = bed.make_job(_all_of(strange), strange)
        bed.send_job(given.job)
        message, _ = bed.next()
        is_refused = isinstance(message, Fault) and message.round == given.job.round
        check(is_refused, f"a job of no variant: got {in_short(message)}, expected a fault")
        bed.expect_ready()
    bed.welcome()
    bed.wait_ready()


def _all_of(model: ModelSpec) -> Plan:
    return replace(PLAN, segments=(Segment(first=1, last=model.exit),))


def bad_frames(bed: Bed) -> None:
    """Frames that break the rules are answered by the fault `protocol`, round 0; a job given after
    them goes well."""
    for name, frames in bad_frames_for_a_device().items():
        bed.send_raw(f"a bad frame: {name}", *frames)
        message, _ = bed.next()
        is_refused = isinstance(message, Fault) and (message.code, message.round) == ("protocol", 0)
        check(is_refused, f"{name}: got {in_short(message)}, expected fault protocol, round 0")
    finish(bed, bed.give())
