"""Costs against hand counts and against larger steps."""

import gc
from collections import Counter
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.capacity import counting, moments
from edge_sdk.capacity.costs import Moment, SegmentCost, examples_at_once, in_parts, recomputing
from edge_sdk.capacity.counting import segment_costs
from edge_sdk.capacity.counting_apart import segment_costs_apart
from edge_sdk.errors import CapacityError, ConfigError
from edge_sdk.models import FAMILIES, Family, build
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.tensor_lists import is_frozen
from tests.support.examples import cnn

CNN = ModelSpec(
    family="cnn", input_shape=(1, 4, 4), num_classes=2, exit=2, options={"channels": (2, 3)}
)

PLAN = Plan(segments=(Segment(first=1, last=2),), batch_size=4, optimizer="sgd")


def by_segment(
    spec: ModelSpec, plan: Plan = PLAN, num_examples: int = 10
) -> dict[tuple[int, int], SegmentCost]:
    found = segment_costs(spec, plan, num_examples, runtime_bytes=1000)
    return {(cost.first, cost.last): cost for cost in found}


def saved_bytes(cost: SegmentCost) -> int:
    """Activations at once, at the most."""
    return max(moment.at(examples_at_once(cost)) for moment in cost.moments)


def test_prefixes_then_single_stages():
    assert list(by_segment(replace(CNN, exit=3, options={}))) == [
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 2),
        (3, 3),
    ]


def test_counted_on_one_thread(monkeypatch):
    seen, before = [], torch.get_num_threads()

    cnn = FAMILIES["cnn"]

    def build_watched(spec, options):
        seen.append(torch.get_num_threads())
        return cnn.build(spec, options)

    watched = {"watched": Family(build_watched, cnn.options)}
    monkeypatch.setattr(FAMILIES, "_entries", FAMILIES._entries | watched)
    torch.set_num_threads(3)
    try:
        by_segment(replace(CNN, family="watched"))
        # the whole model of a family that is not of the package is built three times
        assert (seen, torch.get_num_threads()) == ([1, 1, 1, 1], 3)
    finally:
        torch.set_num_threads(before)


def test_tensors_counted_by_hand():
    found = by_segment(CNN)
    # stage 1: conv 1->2 of 18 and conv 2->2 of 36 weights, two norms of 2 * 2 trained and 2 * 2
    # running: 62 trained, 70 held. Exit 1: 2 * 2 * 2 inputs to 2 classes: 16 + 2 = 18.
    # Stage 2: conv 2->3 of 54, norm of 6 + 6: 60, 66. Exit 2: 3 * 2 * 2 to 2: 24 + 2 = 26.
    one, both, alone = found[1, 1], found[1, 2], found[2, 2]
    assert one.gradient_bytes == 4 * (62 + 18)
    assert one.upload_bytes == one.download_bytes == 4 * (70 + 18)
    # the model; before, what was received too
    assert one.parameter_bytes == one.download_bytes
    # the largest weights: 36 of stage 1, 54 of stage 2, whose gradients come first
    assert [moment.weight_bytes for moment in one.moments] == [4 * 36, 0]
    assert [moment.weight_bytes for moment in both.moments] == [4 * 54, 4 * 36, 0]
    assert one.load_bytes == 2 * one.download_bytes
    assert both.gradient_bytes == 4 * (62 + 18 + 60 + 26)
    assert alone.gradient_bytes == 4 * (60 + 26)
    assert alone.upload_bytes == 4 * (66 + 26)
    assert alone.download_bytes == 4 * (70 + 66 + 26)  # no exit 1
    assert alone.parameter_bytes == 4 * (70 + 18 + 66 + 26)
    assert alone.load_bytes == 4 * (70 + 18 + 66 + 26) + alone.download_bytes
    assert {cost.runtime_bytes for cost in found.values()} == {1000}


def test_flops_counted_by_hand():
    found = by_segment(CNN)
    # multiply-adds on 4 * 4 positions: 16 * 18 = 288 and 16 * 36 = 576; exit 1: 16. Two operations
    # each; backward twice forward, but no gradient for the input of the first convolution.
    assert found[1, 1].flops_per_example == 2 * (2 * 288 + 3 * 576 + 3 * 16)
    assert found[1, 1].frozen_flops_per_example == 0
    # stage 2 alone, on 2 * 2 positions: 4 * 54 = 216, and its features get no gradient; exit 2: 24
    assert found[2, 2].flops_per_example == 2 * (2 * 216 + 3 * 24)
    assert found[2, 2].frozen_flops_per_example == 2 * (288 + 576)


def test_cache_is_the_features_of_all_examples():
    # 10 examples, features (2, 2, 2) of 4 bytes
    twice = replace(PLAN, epochs=2)
    assert by_segment(CNN, twice)[2, 2].cache_bytes == 10 * 8 * 4
    assert by_segment(CNN, twice)[1, 2].cache_bytes == 0
    assert by_segment(CNN)[2, 2].cache_bytes == 0  # a single epoch has no use for them


def test_layers_counted_by_hand():
    found = by_segment(CNN)
    # stage 1: convolution, norm, ReLU, twice, and a pool; exit: pool, flatten, linear; stage 2: a
    # convolution, norm, ReLU, and no pool of sides below 4
    assert (found[1, 1].num_layers, found[1, 1].num_frozen_layers) == (10, 0)
    assert (found[2, 2].num_layers, found[2, 2].num_frozen_layers) == (6, 7)


@pytest.mark.parametrize(
    ("plan", "copies"),
    [
        (PLAN, 0),
        (replace(PLAN, momentum=0.9), 1),
        (replace(PLAN, prox_mu=0.1), 1),
        (replace(PLAN, optimizer="adam"), 2),  # two moments
        (replace(PLAN, optimizer="adam", prox_mu=0.1), 3),
        (replace(PLAN, correction=True), 3),  # received weights, two control variates
        (replace(PLAN, dyn_alpha=0.1), 2),  # received weights, its own gradient
    ],
)
def test_optimizer_copies(plan, copies):
    found = by_segment(CNN, plan)[1, 1]
    assert found.optimizer_bytes == copies * found.gradient_bytes
    # during Adam's step the root of the second moment
    assert (Moment(fixed_bytes=found.gradient_bytes) in found.moments) == (plan.optimizer == "adam")


DISTILLED = replace(PLAN, distill="mutual", distill_weight=1.0)


@pytest.mark.parametrize("plan", [PLAN, DISTILLED], ids=["plain", "distilled"])
@pytest.mark.parametrize("family", ["cnn", "mlp", "resnet18", "vgg", "vit"])
def test_saved_bytes_equal_those_of_a_step_of_the_whole_batch(family, plan):
    spec = ModelSpec(family=family, input_shape=(3, 18, 25), num_classes=5, exit=3)
    whole = saved_in_one_step(build(spec).ready("cpu"), spec, plan, batch=8)
    counted = by_segment(spec, replace(plan, batch_size=8), num_examples=100)[1, 3]
    order = (moments.LAST, 2, 1)  # of the backward pass
    expected = [moments._whole(whole, number) for number in order]
    assert [moment.at(8) for moment in counted.moments[:3]] == expected
    assert saved_bytes(counted) == max(expected)
    again = [moments._again(whole, number) for number in order]
    if counted.recompute_moments:
        assert [moment.at(8) for moment in counted.recompute_moments[:3]] == again
    else:
        assert max(again) >= max(expected)
    in_halves = by_segment(spec, replace(plan, batch_size=4), num_examples=100)[1, 3]
    assert saved_bytes(in_halves) == saved_bytes(in_parts(counted, 4))


def saved_in_one_step(model, spec: ModelSpec, plan: Plan, batch: int) -> Counter[str]:
    x = moved(torch.randn(batch, *spec.input_shape), "cpu")
    return moments.saved(moments.whole_step(model, plan), [x])


def test_autograd_saves_what_a_layer_needs_by_hand():
    """mlp of one stage, 3 to 5, and its exit, 5 to 2, on 4 examples: the inputs of the layer and of
    its norm, the output of the ReLU, which the exit takes too, and the log-softmax; of the norm 4
    statistics of 5 numbers; 4 labels of 8 bytes, and how many there are."""
    options = {"widths": (5,)}
    spec = ModelSpec(family="mlp", input_shape=(3,), num_classes=2, exit=1, options=options)
    found = counting.autograd_bytes(build(spec), PLAN, torch.zeros(4, 3))
    assert found == 4 * 4 * (3 + 5 + 5 + 2) + 4 * 4 * 5 + 4 * 8 + 4


@pytest.mark.parametrize(("shape", "hidden"), [((3, 51), 64), ((9, 40), 24), ((20, 30), 16)])
def test_saved_bytes_of_lstm_are_near_those_of_the_whole_batch(shape, hidden):
    """Its kernel keeps one block of memory whose size is its own affair."""
    spec = ModelSpec(
        family="lstm", input_shape=shape, num_classes=5, exit=2, options={"hidden": hidden}
    )
    whole = saved_in_one_step(build(spec), spec, PLAN, batch=32)
    counted = by_segment(spec, replace(PLAN, batch_size=32), num_examples=100)[1, 2]
    at_once = max(moments._whole(whole, number) for number in (moments.LAST, 1))
    assert saved_bytes(counted) == pytest.approx(at_once, rel=0.05)


def test_flops_of_lstm_counted_by_hand():
    spec = ModelSpec(
        family="lstm", input_shape=(3, 7), num_classes=2, exit=2, options={"hidden": 5}
    )
    found = by_segment(spec)
    # per step 4 gates of 5 from 3 inputs and 5 states: 60 + 100 multiply-adds of two operations;
    # backward twice forward, but no gradient for the input. The exit: 5 * 2 = 10.
    assert found[1, 1].flops_per_example == 2 * (7 * (2 * 60 + 3 * 100) + 3 * 10)
    assert found[2, 2].frozen_flops_per_example == 2 * 7 * (60 + 100)


def test_distillation_saves_a_few_logits_and_no_operations_that_count():
    plain, distilled = by_segment(CNN), by_segment(CNN, DISTILLED)
    assert distilled[2, 2] == plain[2, 2]  # one exit
    # 2 exits, each with logits, 4 examples of 2 classes of 4 bytes: softmax, teacher, ...
    more = saved_bytes(distilled[1, 2]) - saved_bytes(plain[1, 2])
    assert 0 < more <= 2 * 3 * 4 * 2 * 4
    assert distilled[1, 2].flops_per_example == plain[1, 2].flops_per_example


def test_a_wide_frozen_prefix_counts_where_it_exceeds_the_trained_stage():
    # one example through the frozen stage: 64 channels in and out of a 16 x 16 layer, 4 bytes; and
    # once its largest weight, 64 x 64 kernels of 3 x 3
    spec = ModelSpec(
        family="cnn", input_shape=(1, 16, 16), num_classes=2, exit=2, options={"channels": (64, 1)}
    )
    trained, frozen = by_segment(spec)[2, 2].moments
    assert frozen.at(4) == 4 * 2 * 64 * 16 * 16 * 4 + 64 * 64 * 9 * 4
    assert trained.at(4) < 4 * 64 * 16 * 16 * 4


def test_bytes_where_a_stage_runs_again_by_hand():
    """mlp of widths 5, 7 on 3 numbers, 4 examples: inputs of both stages 4 * (3 + 5) numbers of 4
    bytes are kept; beside them the second stage and the exits, or the first made again."""
    spec = ModelSpec(
        family="mlp", input_shape=(3,), num_classes=2, exit=2, options={"widths": (5, 7)}
    )
    plain, again = by_segment(spec)[1, 2], recomputing(by_segment(spec)[1, 2])
    kept = 4 * 4 * (3 + 5)
    assert kept < saved_bytes(again) < saved_bytes(plain)
    assert again.recompute_flops_per_example == 2 * 3 * 5
    assert again.flops_per_example == plain.flops_per_example + 2 * 3 * 5
    assert by_segment(spec)[2, 2].recompute_moments is None
    with pytest.raises(CapacityError, match="nothing to run again"):
        recomputing(again)


@pytest.mark.parametrize("plan", [PLAN, DISTILLED, replace(PLAN, prox_mu=0.1)])
def test_the_coordinators_levers_count(plan):
    wide = replace(plan, batch_size=32)
    found = by_segment(CNN, wide, num_examples=100)[1, 2]
    parts = by_segment(CNN, replace(wide, micro_batch=16), num_examples=100)[1, 2]
    assert parts == in_parts(found, 16)
    assert by_segment(CNN, replace(wide, micro_batch=64), num_examples=100)[1, 2] == found
    again = by_segment(CNN, replace(wide, recompute=True), num_examples=100)[1, 2]
    assert again == recomputing(found)
    assert saved_bytes(again) < saved_bytes(found)


def test_what_was_counted_before_memory_ran_out_is_told(monkeypatch):
    """An allocation that fails by exception counts like a process that was killed."""
    whole = segment_costs(CNN, PLAN, 10, 1000)
    real = counting._cost

    def fail_at(*names):
        def cost(model, spec, segment, *rest):
            if (segment.first, segment.last) in names:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return real(model, spec, segment, *rest)

        monkeypatch.setattr(counting, "_cost", cost)

    fail_at((2, 2), (1, 2))
    assert segment_costs_apart(CNN, PLAN, 10, 1000) == whole[:1]
    fail_at((1, 2))  # after stage 2 alone, which takes less
    assert segment_costs_apart(CNN, PLAN, 10, 1000) == (whole[0], whole[2])
    fail_at((1, 1))
    with pytest.raises(CapacityError, match="the model's costs ran out of memory; free some"):
        segment_costs_apart(CNN, PLAN, 10, 1000)


def test_a_batch_is_no_larger_than_the_data():
    few = by_segment(CNN, replace(PLAN, batch_size=64), num_examples=4)[1, 2]
    assert few.moments == by_segment(CNN)[1, 2].moments


def test_an_exit_without_weight_costs_no_backward_pass():
    deepest = by_segment(CNN, replace(PLAN, exit_weights=(0.0, 1.0)))
    assert deepest[1, 2].flops_per_example == by_segment(CNN)[1, 2].flops_per_example - 2 * 2 * 16


def test_the_counting_child_is_killed_before_its_trainer(monkeypatch):
    score = Path("/proc/self/oom_score_adj")
    if not score.exists():
        pytest.skip("this system has no oom_score_adj")
    before = score.read_text()

    def tell(*_):
        raise ConfigError(f"score {score.read_text()}")

    monkeypatch.setattr(counting, "_cost", tell)
    with pytest.raises(ConfigError, match="score 1000"):
        segment_costs_apart(CNN, PLAN, 10, 1000)
    assert score.read_text() == before


def test_counted_apart_is_the_same():
    assert segment_costs_apart(CNN, PLAN, 10, 1000) == segment_costs(CNN, PLAN, 10, 1000)
    with pytest.raises(ConfigError, match="unknown model family 'none'"):
        segment_costs_apart(replace(CNN, family="none"), PLAN, 10, 1000)


@pytest.mark.parametrize("family", ["cnn", "resnet18"])
def test_counting_leaves_nothing_behind(family):
    """A graph whose nodes keep their own output would stay for good."""
    spec = ModelSpec(family=family, input_shape=(3, 18, 25), num_classes=5, exit=2)
    model = build(spec)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(found) is torch.Tensor for found in gc.get_objects())
        saved_in_one_step(model, spec, PLAN, batch=4)
        after = sum(type(found) is torch.Tensor for found in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


def test_the_most_at_once_by_hand():
    """Stages 1, 2 and the last hold 50, 20, 10 of 86 bytes, 1, 2 and 3 are inputs; their largest
    tensors are 40, 15, 4: 86 + 4 as the last one begins, 76 + 15 without its, 56 + 40 at the first.
    Where stages run again: 6 + 10 + 4, 3 + 20 + 15, 1 + 50 + 40."""
    sizes = Counter({"stages": 3, "all": 86, "input 1": 1, "input 2": 2, "input 3": 3})
    sizes.update({"1": 50, "2": 20, "0": 10, "widest 1": 40, "widest 2": 15, "widest 0": 4})
    order = (moments.LAST, 2, 1)
    assert [moments._whole(sizes, number) for number in order] == [90, 91, 96]
    assert [moments._again(sizes, number) for number in order] == [20, 38, 91]


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_flops_of_attention_counted_by_hand(family):
    """2 heads of 4 features, of which llama shares one key and value; 3 inner features."""
    own = {"kv_heads": 1} if family == "llama" else {}
    shape = (1, 6, 2) if family == "vit" else (1, 6)
    spec = ModelSpec(
        family=family,
        input_shape=shape,
        num_classes=2,
        exit=2,
        options={"dim": 8, "heads": 2, "ffn": 3, "patch": 2, **own},
    )
    found = by_segment(spec)
    linear = 3 * 8 * (8 + 8 + 8) if own else 3 * 8 * 4 * 8  # q, k with v, o at 3 positions
    linear += 3 * 8 * 3 * (3 if own else 2)
    scores = 3 * 3 * 8  # of all heads together; as much again for their sums of values
    patches = 3 * 8 * (4 if family == "vit" else 2)
    assert found[2, 2].frozen_flops_per_example == 2 * (patches + linear + 2 * scores)
    exit = 8 * 2
    # backward twice a product, of patches once; of attention the scores again and four products
    trained = 2 * patches + 3 * linear + 7 * scores + 3 * exit
    assert found[1, 1].flops_per_example == 2 * trained


@pytest.mark.parametrize(("frozen", "first", "begin"), [(("stages",), 1, 3), (("stages.0",), 1, 1)])
def test_what_is_frozen_costs_no_gradient_and_travels_once(frozen, first, begin):
    spec = cnn()
    whole = by_segment(spec, PLAN, num_examples=100)[first, 3]
    plan = replace(PLAN, frozen=frozen, epochs=2)
    cost = by_segment(spec, plan, num_examples=100)[first, 3]
    held = build(spec).tensors()
    kept = sum(t.numel() * t.element_size() for n, t in held.items() if is_frozen(n, frozen))
    still = [n for n, _ in build(spec).named_parameters() if not is_frozen(n, frozen)]
    assert cost.gradient_bytes == sum(held[name].numel() * 4 for name in still)
    assert cost.optimizer_bytes == 2 * cost.gradient_bytes * (PLAN.optimizer == "adam")
    assert cost.kept_bytes == kept
    assert cost.download_bytes == whole.download_bytes - kept
    assert cost.upload_bytes == whole.upload_bytes - kept
    assert cost.parameter_bytes == whole.parameter_bytes
    with torch.no_grad():
        made, features = torch.zeros(1, *spec.input_shape), []
        for stage in build(spec).eval().stages[:begin]:
            made = stage(made)
            features.append(made.numel() * 4)
    assert cost.cache_bytes == 100 * sum(features), "of every frozen stage that has an exit"
    assert cost.flops_per_example < 0.7 * whole.flops_per_example
    assert cost.frozen_flops_per_example > 0
    assert {spec.name for spec in cost.tensors} <= set(held), "what a job lists is the same"
