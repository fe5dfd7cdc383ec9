"""An update against what the job asked for: its message, its bytes, and its numbers against our own
training of the same data."""

from __future__ import annotations

import torch

from edge_sdk.errors import EdgeError
from edge_sdk.protocol.messages import Update
from edge_sdk.protocol.stream import digest_of
from edge_sdk.protocol.tensor_lists import check_specs, trained_names
from edge_sdk.protocol.tensors import Receiver, Sender, Tensors, check_finite
from edge_sdk.training.trainer import TrainResult, train
from tools.conformance.bed import Bed, Failed, Given, check

MOST_APART = 1e-3  # of the way that a tensor went, in the 2-norm; numpy and torch: 5e-5
LEAST_WAY = 1e-6  # below it a tensor has not moved


def check_announced(bed: Bed, given: Given, update: Update) -> None:
    """Raise Failed unless the message is as the job asks."""
    job, plan = given.job, given.job.plan
    wanted = (job.id, job.round)
    check((update.job, update.round) == wanted, f"update names {update.job}, {update.round}")
    names = trained_names(given.tensors, plan.segments)
    specs = {spec.name: spec for spec in job.tensors}
    try:
        check_specs(update.tensors, [specs[name] for name in names], "its update")
    except EdgeError as error:
        raise Failed(str(error)) from error
    exits = sorted(e for s in plan.segments for e in range(s.first, s.last + 1))
    told = sorted(result.exit for result in update.exits)
    check(told == exits, f"results of exits {told}, trained were {exits}")
    assert bed.hello is not None
    most = bed.hello.num_examples
    check(update.num_examples <= most, f"{update.num_examples} examples, hello said {most}")
    full, rest = divmod(most, plan.batch_size)
    batches = full + (rest >= min(3, plan.batch_size))
    steps = len(plan.segments) * plan.epochs * batches
    if update.num_examples == most:
        check(update.num_steps == steps, f"num_steps {update.num_steps}, expected {steps}")


def check_arrived(given: Given, update: Update, receiver: Receiver) -> None:
    """Raise Failed unless the bytes have the digest that was announced, and are numbers."""
    tensors = receiver.tensors()
    sender = Sender(tensors)
    digest = digest_of(sender.part(index) for index in range(sender.num_parts))
    check(digest == update.digest, f"its bytes have the digest {digest}, update says otherwise")
    try:
        check_finite(tensors, f"its update of round {given.job.round}")
    except EdgeError as error:
        raise Failed(str(error)) from error


def check_trained(bed: Bed, given: Given, update: Update, tensors: Tensors) -> None:
    """Raise Failed unless a job that leaves nothing to chance moved the tensors as our own training
    does: with one batch an epoch the order of the examples changes nothing."""
    job = given.job
    if job.plan.batch_size < len(bed.examples) or job.plan.micro_batch:
        return
    sent = {name: tensor.clone() for name, tensor in given.tensors.items()}
    ours: TrainResult = train(job.model, job.plan, sent, bed.examples)
    for name, wanted in ours.tensors.items():
        way = torch.linalg.vector_norm(wanted - given.tensors[name]).item()
        apart = torch.linalg.vector_norm(tensors[name] - wanted).item()

        is_close = apart <= MOST_APART * way + LEAST_WAY
        check(is_close, f"{name} ends {apart:.3g} from where it should, a way of {way:.3g}")
    for got, want in zip(sorted_exits(update), ours.exits, strict=True):
        is_close = abs(got.loss - want.loss) <= 1e-3 + 0.01 * want.loss
        check(is_close, f"loss {got.loss:.4f} of exit {got.exit}, expected {want.loss:.4f}")
        most = 1.5 / len(bed.examples)  # one answer may be a tie
        check(abs(got.metric - want.metric) <= most, f"accuracy {got.metric:.3f} of exit")


def sorted_exits(update: Update) -> list:
    return sorted(update.exits, key=lambda result: result.exit)
