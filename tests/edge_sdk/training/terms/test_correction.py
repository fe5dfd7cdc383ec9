"""SCAFFOLD on the device: its steps, what returns and what is kept."""

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.models import build, initial_tensors
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.training.terms.correction import Correction
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples
from tests.support.terms import context, trained

PLAN = Plan(
    segments=(Segment(first=1, last=1),),
    batch_size=8,
    epochs=2,
    optimizer="sgd",
    lr=0.1,
    correction=True,
)
SPEC = cnn(exit=1)
PARAMETERS = [name for name, _ in build(SPEC).named_parameters()]


def zeros() -> dict[str, torch.Tensor]:
    sent = initial_tensors(SPEC, 0)
    return {f"correction/{name}": torch.zeros_like(sent[name]) for name in PARAMETERS}


def local_round(theta: float, c: float, own: float, curvature: float, minimum: float, steps: int):
    """(y, c_i+ - c_i, c_i+) of a client whose loss is curvature / 2 * (y - minimum)^2."""
    term = Correction(context(kept={"correction/w": torch.tensor([own])}, correction=True))
    term.received({"correction/w": torch.tensor([c])})
    segment = trained(w=[theta])
    term.begin_(segment)
    y = segment.named["w"]
    for _ in range(steps):
        y.grad = curvature * (y.detach() - minimum)
        term.before_step_()
        y.data -= 0.1 * y.grad
    term.end_(steps)
    return y.item(), term.returned({})["correction/w"].item(), term.kept()["correction/w"].item()


def test_two_steps_by_hand():
    # loss (y - 1)^2 / 2 from theta = 0, c = 0.5, c_i = -1: gradients y - 1, each + 1.5
    # y = 0 - 0.1 (-1 + 1.5) = -0.05; then -0.05 - 0.1 (-1.05 + 1.5) = -0.095
    # c_i+ = -1 - 0.5 + 0.095 / 0.2 = -1.025, the mean of the gradients -1 and -1.05
    y, change, own = local_round(0.0, 0.5, -1.0, curvature=1.0, minimum=1.0, steps=2)
    assert (y, own, change) == pytest.approx((-0.095, -1.025, -0.025))


def test_fixed_point_on_quadratics_by_hand():
    """Losses (y - 0)^2 / 2 and 3 (y - 4)^2 / 2: their mean is smallest at 12/4 = 3. There the
    gradients are 3 and -3, so c_i = 3, -3 and c = 0 stand still; FedAvg drifts from it. From zeros
    the rounds lead there."""
    clients = {"flat": (1.0, 0.0), "steep": (3.0, 4.0)}
    for own, (curvature, minimum) in zip((3.0, -3.0), clients.values(), strict=True):
        y, change, kept = local_round(3.0, 0.0, own, curvature, minimum, steps=5)
        assert (y, change, kept) == pytest.approx((3.0, 0.0, own), abs=1e-6)
    drifted = [local_round(3.0, 0.0, 0.0, *at, steps=5)[0] for at in clients.values()]
    assert abs(sum(drifted) / 2 - 3.0) > 0.1
    theta, c, owns = 0.0, 0.0, dict.fromkeys(clients, 0.0)
    for _ in range(60):
        found = {n: local_round(theta, c, owns[n], *at, steps=5) for n, at in clients.items()}
        theta = sum(y for y, _, _ in found.values()) / 2
        c += sum(change for _, change, _ in found.values()) / 2
        owns = {name: kept for name, (_, _, kept) in found.items()}
    assert theta == pytest.approx(3.0, abs=1e-3)
    assert list(owns.values()) == pytest.approx([3.0, -3.0], abs=1e-2)


def test_the_first_round_is_plain_sgd_and_tells_the_mean_gradient():
    """c_i and c begin at zero (a published baseline begins at the weights): 3 batches, 2 epochs."""
    sent, data = initial_tensors(SPEC, 0), examples(24)
    plain = train(SPEC, replace(PLAN, correction=False), sent, data)
    result = train(SPEC, PLAN, sent | zeros(), data)
    assert result.num_steps == 6
    assert list(result.tensors) == [*sent, *zeros()]
    for name in sent:
        assert torch.equal(result.tensors[name], plain.tensors[name]), name
    for name in PARAMETERS:
        mean = (sent[name] - plain.tensors[name]) / (6 * 0.1)
        change = result.tensors[f"correction/{name}"]
        assert torch.allclose(change, mean, atol=1e-6), name
        assert torch.equal(result.state[f"correction/{name}"], change), name
    assert set(result.state) == set(zeros())  # of no buffers


def test_variates_of_what_was_not_trained_stay():
    spec = cnn(exit=2)
    names = [name for name, _ in build(spec).named_parameters()]
    sent, data = initial_tensors(spec, 0), examples(24)
    shared = {f"correction/{name}": torch.zeros_like(sent[name]) for name in names}
    both = train(spec, replace(PLAN, segments=(Segment(first=1, last=2),)), sent | shared, data)
    second = replace(PLAN, segments=(Segment(first=2, last=2),))
    given = {n: t for n, t in (sent | shared).items() if ".1." in n or n.startswith("stages.0")}
    after = train(spec, second, given, data, state=both.state, state_round=4)
    assert after.state_round == 4
    for name in both.state:
        is_same = torch.equal(after.state[name], both.state[name])
        assert is_same == (".0." in name[: len("correction/stages.0.")]), name


def test_training_leaves_what_is_kept_as_it_was():
    sent, data = initial_tensors(SPEC, 0) | zeros(), examples(24)
    kept = train(SPEC, PLAN, sent, data).state
    before = {name: tensor.clone() for name, tensor in kept.items()}
    train(SPEC, PLAN, sent, data, state=kept, state_round=1)
    assert all(torch.equal(kept[name], before[name]) for name in before)
    assert not any(sent[name].any() for name in zeros())


def test_variates_of_another_model_are_left_out(caplog):
    sent, data = initial_tensors(SPEC, 0) | zeros(), examples(24)
    other = {name: torch.ones(2) for name in zeros()}
    fresh = train(SPEC, PLAN, sent, data)
    result = train(SPEC, PLAN, sent, data, state=other, state_round=3)
    assert result.state_round == 0
    assert "begun without" in caplog.text
    for name, tensor in fresh.tensors.items():
        assert torch.equal(result.tensors[name], tensor), name


@pytest.mark.parametrize("changes", [{"optimizer": "adam"}, {"momentum": 0.9}], ids=str)
def test_only_plain_sgd_tells_the_mean_gradient(changes):
    sent = initial_tensors(SPEC, 0) | zeros()
    with pytest.raises(ConfigError, match="correction needs sgd without momentum"):
        train(SPEC, replace(PLAN, **changes), sent, examples())


def test_a_job_without_variates_is_refused():
    with pytest.raises(ShapeError, match="job lacks tensors correction/exits"):
        train(SPEC, PLAN, initial_tensors(SPEC, 0), examples())
