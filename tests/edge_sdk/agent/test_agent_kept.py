"""What a client keeps between rounds, over the wire: the real agent and trainer, a scripted
coordinator."""

from __future__ import annotations

import torch
from msgspec.structs import replace

from edge_sdk.models import build
from edge_sdk.protocol.messages import Accepted, Fault, Ready, Update
from edge_sdk.protocol.tensors import Tensors
from edge_sdk.training.trainer import train
from tests.support.agent import MODEL, WHOLE, job_tensors
from tests.support.examples import examples

PLAN = replace(WHOLE, optimizer="sgd", lr=0.05, correction=True)


def test_it_counts_once_its_update_was_accepted(settled):
    """Round 2 is late, so round 3 begins from what was kept of round 1."""
    coordinator, _ = settled
    coordinator.run += 1
    coordinator.welcome(MODEL, PLAN)
    coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
    parameters = [name for name, _ in build(MODEL).named_parameters()]
    weights = job_tensors(PLAN)
    sent = weights | {f"correction/{n}": torch.zeros_like(weights[n]) for n in parameters}

    def trained(round: int, answer: Accepted | Fault) -> tuple[Update, Tensors]:
        sender = coordinator.give(round, MODEL, PLAN, sent)
        coordinator.serve_parts(round, sender)
        update = coordinator.wait_for(Update)
        tensors = coordinator.fetch_update(update)
        coordinator.send(answer)
        coordinator.wait_for(Ready)
        return update, tensors

    first, got = trained(1, Accepted(round=1))
    ours = train(MODEL, PLAN, sent, examples(24))
    late, _ = trained(2, Fault(code="late", detail="closed", round=2))
    third, got_third = trained(3, Accepted(round=3))
    assert [update.state_round for update in (first, late, third)] == [0, 1, 1]
    again = train(MODEL, PLAN, sent, examples(24), state=ours.state, state_round=1)
    for name in sent:
        assert torch.allclose(got[name], ours.tensors[name], atol=1e-6), name
        assert torch.allclose(got_third[name], again.tensors[name], atol=1e-6), name
    assert not torch.allclose(got_third["exits.2.2.bias"], got["exits.2.2.bias"], atol=1e-6)
