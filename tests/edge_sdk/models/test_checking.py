"""What is refused of a family of a person's own before a round, each mistake in one line."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.capacity.counting_apart import segment_costs_apart
from edge_sdk.errors import CapacityError, ConfigError
from edge_sdk.models import build, checking, initial_tensors, register_family
from edge_sdk.models.checking import check_family
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.training.trainer import train
from tests.support.examples import examples
from tests.support.mistakes import LINES

MODULE = "tests.support.mistaken_families"
PLAN = Plan(segments=(Segment(first=1, last=2),), batch_size=4)


@pytest.fixture(autouse=True)
def mistaken(own_things, monkeypatch):
    """Known in these tests only."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return importlib.import_module(MODULE)


def spec(family: str, exit: int = 2) -> ModelSpec:
    return ModelSpec(family=family, input_shape=(4,), num_classes=3, exit=exit)


@pytest.mark.parametrize("mistake", ["hidden-first", "made-once", "numpy-draws"])
def test_one_exit_is_enough_to_find_what_is_not_drawn_from_the_seed(mistake):
    with pytest.raises(ConfigError, match=re.escape(LINES[mistake])):
        check_family(spec(mistake, exit=1))


def test_every_mistake_has_its_line(mistaken):
    assert set(LINES) | {"never-ends", "dies"} == set(mistaken.MISTAKES)


@pytest.mark.parametrize("mistake", LINES)
def test_a_mistake_is_one_line_that_names_family_and_place(mistake):
    state = torch.random.get_rng_state()
    with pytest.raises(ConfigError) as raised:
        check_family(spec(mistake, exit=3))
    line = str(raised.value)
    assert line.startswith(f"family '{mistake}': ")
    assert LINES[mistake] in line
    assert "\n" not in line
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was disturbed"


def test_images_are_tried_with_their_channels_last():
    """As `ready` and `moved` lay them out for training."""
    model = ModelSpec(family="viewed", input_shape=(1, 4, 4), num_classes=3, exit=1)
    with pytest.raises(ConfigError, match=r"stages.0.1 \(Returns\) raises RuntimeError: view size"):
        check_family(model)


def test_the_place_is_the_line_of_the_authors_code(mistaken):
    with pytest.raises(ConfigError) as raised:
        build(spec("raises"))
    found = re.search(
        r"KeyError: 'no_such_option' \((.*):(\d+)\); mend it there", str(raised.value)
    )
    assert found
    assert found[1] == mistaken.__file__
    assert "raise KeyError" in Path(found[1]).read_text().splitlines()[int(found[2]) - 1]


SOUND = ["plain", "no-parameters", "frozen-stages", "looks-at-values", "finite-mask", "half-inside"]


@pytest.mark.parametrize("family", [*SOUND, "counts-in-a-buffer", "softmax", "log-softmax"])
def test_what_can_be_trained_is_taken(family):
    check_family(spec(family, exit=3))
    assert len(segment_costs_apart(spec(family), PLAN, 10, 0)) == 3


def test_an_exit_of_probabilities_is_told(caplog):
    """Each row of a softmax sums to 1; those of a log-softmax train as logits do."""
    for family in ("plain", "log-softmax"):
        check_family(spec(family))
    assert not caplog.text
    check_family(spec("softmax"))
    assert "family 'softmax': its exits give probabilities" in caplog.text


def test_a_tensor_may_be_shared_within_a_stage_and_its_exit():
    """Named once, under the stage; trained there by all who use it."""
    model = spec("tied-in-one-stage", exit=1)
    check_family(model)
    start = initial_tensors(model, 0)
    assert [name for name in start if "0.3" in name or "0.4" in name] == [
        "stages.0.3.weight",
        "stages.0.3.bias",
    ]
    assert not any(name.startswith("exits.0.0.") for name in start)
    plan = replace(PLAN, segments=(Segment(first=1, last=1),), optimizer="sgd")
    data = examples(8, shape=(4,))
    trained = train(model, plan, start, data).tensors
    assert set(trained) == set(start)
    assert not torch.equal(trained["stages.0.3.weight"], start["stages.0.3.weight"])


def test_families_of_the_package_are_built_once(monkeypatch):
    built = []

    def count(spec):
        built.append(spec)
        return build(spec)

    monkeypatch.setattr(checking, "build", count)
    check_family(replace(spec("mlp", exit=3)))
    assert built == [spec("mlp", exit=3)]


def test_blocks_have_a_bound():
    model = ModelSpec(
        family="resnet18",
        input_shape=(3, 8, 8),
        num_classes=2,
        exit=1,
        options={"blocks": 1_000_000},
    )
    with pytest.raises(ConfigError, match="option blocks is 1000000, expected a whole number, at"):
        build(model)


def test_counting_ends_after_its_time():
    with pytest.raises(CapacityError, match="costs took more than 0.3 s and was ended; a smaller"):
        segment_costs_apart(spec("never-ends"), PLAN, 10, 0, limit_s=0.3)


def test_what_was_counted_in_time_counts(mistaken, caplog):
    """The whole model of two exits is never built; the costs of exit 1 are known."""
    shallow = mistaken.changed(mistaken.SOUND["plain"])

    def slow(spec):
        return mistaken.never_ends(spec, [], []) if spec.exit > 1 else shallow(spec)

    register_family("slow", slow)
    found = segment_costs_apart(spec("slow"), PLAN, 10, 0, limit_s=3.0)
    assert [(cost.first, cost.last) for cost in found] == [(1, 1)]
    assert "took more than 3 s and was ended; known for 1 of its segments" in caplog.text


def test_a_family_that_ends_the_process_ends_the_count_only():
    with pytest.raises(ConfigError, match="counting the model's costs ended with status 7"):
        segment_costs_apart(spec("dies"), PLAN, 10, 0)


def test_what_a_layer_raises_in_training_is_one_line(mistaken):
    """Not seen with two or three examples: the third batch is another size."""

    def five(spec):
        stages, exits = mistaken.parts(spec)
        exits[0].append(mistaken.Returns(lambda x: x if len(x) < 4 else x.reshape(5, 3)))
        return mistaken.StagedModel(stages, exits)

    register_family("five", five)
    check_family(spec("five"))
    data = examples(8, shape=(4,))
    model = spec("five", exit=1)
    plan = replace(PLAN, segments=(Segment(first=1, last=1),))
    with pytest.raises(
        ConfigError,
        match=r"family 'five': exits.0.1 \(Returns\) raises RuntimeError: shape '\[5, 3",
    ):
        train(model, plan, initial_tensors(model, 0), data)


def test_options_that_are_no_struct_are_the_familys_mistake(mistaken):
    register_family("of-dict", lambda spec, options: None, dict)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="family 'of-dict': build raises AttributeError"):
        check_family(spec("of-dict"))
