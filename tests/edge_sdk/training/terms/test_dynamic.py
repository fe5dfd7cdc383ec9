"""FedDyn on the device."""

import pytest
import torch

from edge_sdk.models import build, initial_tensors
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.training.terms.dynamic import Dynamic
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples
from tests.support.terms import context, trained


def test_two_steps_by_hand():
    # loss (w - 1)^2 / 2, alpha 0.5, theta = 0, g = -1, lr 0.1; gradient (w - 1) + 1 + 0.5 w = 1.5 w
    # at w = 0 it is 0: stands still. With g = 1: w - 1 - 1 + 0.5 w: -2, w = 0.2; -1.7, w = 0.37
    # g+ = 1 - 0.5 * 0.37
    for own, want_w, want_own in ((-1.0, 0.0, -1.0), (1.0, 0.37, 0.815)):
        kept = {"dyn/w": torch.tensor([own])}
        term = Dynamic(context(kept=kept, dyn_alpha=0.5))
        segment = trained(w=[0.0])
        term.begin_(segment)
        w = segment.named["w"]
        for _ in range(2):
            w.grad = w.detach() - 1
            term.before_step_()
            w.data -= 0.1 * w.grad
        term.end_(2)
        assert w.item() == pytest.approx(want_w)
        assert term.kept()["dyn/w"].item() == pytest.approx(want_own)
        assert kept["dyn/w"].item() == own


def test_it_ends_where_its_term_is_the_gradient_of_its_own_loss():
    """Loss 3 (w - 4)^2 / 2 from theta = 1, g = 0, alpha 0.3: trained to the end, w solves
    3 (w - 4) + 0.3 (w - 1) = 0, and g+ = -0.3 (w - 1) = 3 (w - 4)."""
    term = Dynamic(context(dyn_alpha=0.3))
    segment = trained(w=[1.0])
    term.begin_(segment)
    w = segment.named["w"]
    for _ in range(200):
        w.grad = 3 * (w.detach() - 4)
        term.before_step_()
        w.data -= 0.1 * w.grad
    term.end_(200)
    assert w.item() == pytest.approx(12.3 / 3.3, rel=1e-5)
    assert term.kept()["dyn/w"].item() == pytest.approx(3 * (w.item() - 4), rel=1e-4)


def test_a_job_keeps_its_terms_by_name_and_leaves_what_it_was_given():
    spec, data, sent = cnn(exit=2), examples(24), initial_tensors(cnn(exit=2), 0)
    plan = Plan(segments=(Segment(first=1, last=2),), batch_size=8, dyn_alpha=0.1)
    first = train(spec, plan, sent, data)
    assert list(first.tensors) == list(sent)  # nothing of it travels
    parameters = [name for name, _ in build(spec).named_parameters()]
    assert sorted(first.state) == sorted(f"dyn/{name}" for name in parameters)
    for name in parameters:
        want = -0.1 * (first.tensors[name] - sent[name])
        assert torch.allclose(first.state[f"dyn/{name}"], want, atol=1e-7), name
    before = {name: tensor.clone() for name, tensor in first.state.items()}
    shallow = Plan(segments=(Segment(first=1, last=1),), batch_size=8, dyn_alpha=0.1)
    second = train(spec, shallow, sent, data, state=first.state, state_round=1)
    assert second.state_round == 1
    for name, tensor in before.items():
        assert torch.equal(first.state[name], tensor), name
        is_trained = ".0." in name[: len("dyn/stages.0.")]
        assert torch.equal(second.state[name], tensor) != is_trained, name
