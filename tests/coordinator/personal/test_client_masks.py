from __future__ import annotations

import pytest
import torch

from coordinator.personal.client_masks import ClientMasks
from edge_sdk.errors import ShapeError

W, B = "stages.0.weight", "stages.0.bias"
INITIAL = {W: torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), B: torch.zeros(2)}
MASK = torch.tensor([[True, False, True], [False, False, True]])


def masks():
    return ClientMasks(INITIAL, [W])


def note_(held: ClientMasks, client_id: str, mask: torch.Tensor, state_round: int = 0) -> None:
    held.held[client_id] = held.after(client_id, {W: mask}, state_round)


def test_a_client_begins_with_everything_and_the_initial_values():
    down, beside = masks().sent_to("a", INITIAL)
    assert {name: t.tolist() for name, t in down.items()} == {
        f"mask/{W}": [0b111111],
        f"packed/{W}": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        B: [0.0, 0.0],
    }
    assert {name: t.tolist() for name, t in beside.items()} == {
        f"initial/{W}": INITIAL[W].tolist(),
        f"initial/{B}": [0.0, 0.0],
    }


def test_initial_values_are_copies_of_the_weights():
    # published code goes on to train what it begins again from
    weight = torch.ones(2, 3)
    held = ClientMasks({W: weight}, [W])
    weight.zero_()
    assert held.initial[W].tolist() == [[1.0] * 3] * 2


def test_a_mask_never_grows():
    held = masks()
    note_(held, "a", MASK)
    assert held.sent_to("a", INITIAL)[0][f"packed/{W}"].tolist() == [1.0, 3.0, 6.0]
    note_(held, "a", ~MASK)  # of a peer that lies: nothing is in both
    assert not held.of("a")[W].any()
    assert held.of("b")[W].all()


def test_initial_values_are_sent_until_an_update_counted_and_again_when_they_were_lost():
    held = masks()
    note_(held, "a", MASK)
    assert held.sent_to("a", INITIAL)[1] == {}
    note_(held, "a", MASK, state_round=1)
    assert held.sent_to("a", INITIAL)[1] == {}
    note_(held, "a", MASK, state_round=0)  # it had nothing, and was sent nothing
    assert held.sent_to("a", INITIAL)[1] != {}
    note_(held, "a", MASK, state_round=0)  # that of this job
    assert held.sent_to("a", INITIAL)[1] == {}


def test_state_of_a_client_is_a_bit_an_entry_and_a_byte():
    held = masks()
    note_(held, "a", MASK)
    state = held.state_dict()
    assert set(state) == {f"initial/{W}", f"initial/{B}", "clients/a"}
    assert state["clients/a"].tolist() == [0b100101, 1]
    other = ClientMasks({name: torch.ones_like(t) for name, t in INITIAL.items()}, [W])
    other.load_state_dict(state)
    assert torch.equal(other.of("a")[W], MASK)
    assert torch.equal(other.initial[W], INITIAL[W])
    assert other.sent_to("a", INITIAL)[1] == {}


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("clients/a", torch.zeros(3, dtype=torch.uint8), r"a is \(3,\), expected \(2,\)"),
        ("clients/a", torch.zeros(2), "float32, expected uint8"),
        ("clients/a", torch.tensor([255, 1], dtype=torch.uint8), "bits set behind the 6"),
        (f"initial/{W}", torch.zeros(3, 2), r"is \(3, 2\), expected \(2, 3\)"),
        ("owners", torch.zeros(3), "not expected: owners"),
    ],
)
def test_state_of_another_model_is_refused(name, tensor, said):
    with pytest.raises(ShapeError, match=said):
        masks().load_state_dict(masks().state_dict() | {name: tensor})
