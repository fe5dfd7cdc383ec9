"""Which exit a device trains, with numbers small enough to check by eye."""

import pytest
from msgspec.structs import replace

from edge_sdk.capacity.choice import Choice, choose_exit
from edge_sdk.capacity.costs import (
    LEAST_ERROR_BYTES,
    Moment,
    SegmentCost,
    error_bytes,
    in_parts,
    peak_bytes,
    seconds,
    uncached,
)
from edge_sdk.errors import CapacityError
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.protocol.messages import DeviceProfile

DEVICE = DeviceProfile(
    platform="generic",
    memory_total_bytes=2000,
    memory_available_bytes=1000,
    cores=1.0,
    gflops=2.0,
    link_mbit_s=8e-6,  # 8 bits, one byte a second
)


def cost(
    first: int, last: int, saved_bytes: int = 0, flops_per_example: float = 1e9
) -> SegmentCost:
    return SegmentCost(
        first=first,
        last=last,
        parameter_bytes=100,
        gradient_bytes=20,
        optimizer_bytes=40,
        moments=(Moment(fixed_bytes=saved_bytes),),
        cache_bytes=0 if first == 1 else 7,
        runtime_bytes=500,
        allowance=1.45,
        flops_per_example=flops_per_example,
        frozen_flops_per_example=0.5e9,
        upload_bytes=1,
        download_bytes=2,
    )


def choose(
    costs: list[SegmentCost], profile: DeviceProfile = DEVICE, deadline_s: float | None = None
) -> Choice:
    return choose_exit(costs, profile, deadline_s=deadline_s, num_examples=4, epochs=3)


def test_peak_adds_what_is_held_and_the_allowance_on_the_step():
    # 500 + 100 + 40 + 7 + 1.45 * (80 + 20) = 792
    assert peak_bytes(cost(2, 2, saved_bytes=80)) == 792
    # without a cache 640 + 1.45 * 21 = 670.45, rounded up
    assert peak_bytes(cost(1, 1, saved_bytes=1)) == 671
    rooted = replace(
        cost(1, 1), moments=(Moment(fixed_bytes=1), Moment(fixed_bytes=30)), allowance=2
    )
    assert peak_bytes(rooted) == 640 + 2 * (30 + 20)  # the larger of two moments
    assert error_bytes(replace(rooted, error=0.25)) == LEAST_ERROR_BYTES
    large = replace(rooted, error=0.25, parameter_bytes=10**8)
    assert error_bytes(large) == 0.25 * (10**8 + 140)  # of all but the runtime


def test_peak_is_at_the_moment_of_the_most_activations_and_copies():
    # 10 an example beside a small weight, or 1 beside a large one
    first = Moment(fixed_bytes=2, example_bytes=10, weight_bytes=4)
    last = Moment(fixed_bytes=2, example_bytes=1, weight_bytes=30)
    wide = replace(cost(1, 2), moments=(last, first), allowance=1, batch_size=8)
    assert peak_bytes(wide) == 640 + 20 + (2 + 8 * 10 + 4)  # a kernel's copy of the weight
    assert peak_bytes(in_parts(wide, 4)) == 640 + 20 + (2 + 4 * 1 + 3 * 30)  # two of its gradient


def test_a_deeper_stage_is_offered_only_where_its_weights_leave_room_for_the_prefix():
    """runtime 500, gradients 20, Adam 40, allowance 1: the prefix saves 200 beside weights of 100,
    860 in all; stages 2 and 3 save 10 beside weights of 150 and 300: 720 and 870. Beside those
    weights the prefix takes 910 and 1060, stage 2 beside the weights of 3 takes 870."""
    step = {"allowance": 1.0, "cache_bytes": 0}
    costs = [
        replace(cost(1, 1, 200), **step),
        replace(cost(2, 2, 10), parameter_bytes=150, **step),
        replace(cost(3, 3, 10), parameter_bytes=300, **step),
    ]

    def chosen(memory_bytes: int) -> tuple[int, tuple[int, ...], list[int]]:
        found = choose(costs, replace(DEVICE, memory_available_bytes=memory_bytes))
        return found.exit, found.stages, [row.peak_bytes for row in found.rows]

    assert chosen(859) == (0, (2,), [860, 720, 870])
    assert chosen(909) == (1, (), [860, 720, 870])
    assert chosen(910) == (1, (2,), [910, 720, 870])
    assert chosen(1059) == (1, (2,), [910, 720, 870])
    assert chosen(1060) == (1, (2, 3), [1060, 870, 870])


def test_seconds_count_epochs_the_frozen_pass_once_and_both_transfers():
    # 4 examples * (3 epochs * 1e9 + 0.5e9) / 2e9 = 7 s; (1 + 2) bytes at 1 byte/s = 3 s
    assert seconds(cost(1, 1), DEVICE, 4, 3) == pytest.approx(10.0)


def test_seconds_leave_out_a_link_that_is_not_known():
    assert seconds(cost(1, 1), replace(DEVICE, link_mbit_s=None), 4, 3) == pytest.approx(7.0)


def test_seconds_count_what_layers_cost_beside_their_arithmetic():
    # 7 s as above, and 3 epochs * 2 steps of 4 examples in batches of 3 * 5 layers * 0.1 s = 3 s
    layered = replace(cost(1, 1), batch_size=3, num_layers=5)
    device = replace(DEVICE, link_mbit_s=None, layer_s=0.1)
    assert seconds(layered, device, 4, 3) == pytest.approx(10.0)


def test_seconds_count_the_frozen_layers_once_and_a_third_of_each():
    # 2 steps * (3 epochs * 5 layers + 6 / 3) * 0.1 s = 3.4 s beside the 7 s
    layered = replace(cost(2, 2), batch_size=3, num_layers=5, num_frozen_layers=6)
    device = replace(DEVICE, link_mbit_s=None, layer_s=0.1)
    assert seconds(layered, device, 4, 3) == pytest.approx(10.4)
    # in each of the 3 epochs: 4 * 3 * (1e9 + 0.5e9) / 2e9 = 9 s; 2 * 3 * (5 + 2) * 0.1 s = 4.2 s
    assert seconds(uncached(layered), device, 4, 3) == pytest.approx(13.2)
    # which is the same for a single epoch
    assert seconds(layered, device, 4, 1) == pytest.approx(seconds(uncached(layered), device, 4, 1))


def test_without_a_cache_a_prefix_is_what_it_was():
    prefix = replace(cost(1, 2), frozen_flops_per_example=0.0)
    assert uncached(prefix) == prefix


@pytest.mark.parametrize(
    ("saved_bytes", "deadline_s", "is_feasible", "cache_bytes"),
    [
        (223, 10.0, True, 7),  # 647 + 1.45 * 243 = 999.35 with the cache, and 10 s as above
        (224, 12.0, True, 0),  # 1000.8 with it, 993.8 without: 9 s, and 3 s on the link
        (224, 11.9, False, 0),
        (229, 12.0, False, 0),  # 640 + 1.45 * 249 = 1001.05
    ],
)
def test_features_are_kept_where_they_fit(saved_bytes, deadline_s, is_feasible, cache_bytes):
    row = choose([cost(1, 1), cost(2, 2, saved_bytes)], deadline_s=deadline_s).rows[1]
    assert (row.is_feasible, row.cache_bytes) == (is_feasible, cache_bytes)
    assert row.seconds == pytest.approx(10.0 if cache_bytes else 12.0)


def test_a_stage_that_is_too_slow_without_a_cache_says_so():
    rows = choose([cost(1, 1), cost(2, 2, 224)], deadline_s=11.9).rows
    assert rows[1].reason == "takes 12.0 s (without a cache), the deadline is 11.9 s"


def test_what_prefix_and_stages_take_is_told():
    # exit 1 and stage 2 take 10 s each as above, stage 3 takes 4 * (6e9 + 0.5e9) / 2e9 + 3 = 16 s;
    # a prefix to exit 2 does not fit in memory
    costs = [cost(1, 1), cost(1, 2, 900), cost(2, 2), cost(3, 3, flops_per_example=2e9)]
    choice = choose(costs)
    assert (choice.exit, choice.stages) == (1, (2, 3))
    assert choice.prefix_s == pytest.approx(10)
    assert choice.stage_s == pytest.approx((10, 16))


def test_no_exit_takes_no_time():
    choice = choose([cost(1, 1, 900), cost(2, 2)])
    assert (choice.exit, choice.stages, choice.prefix_s) == (0, (2,), 0.0)


def test_seconds_without_measured_compute_are_refused():
    with pytest.raises(CapacityError, match="no measured compute"):
        seconds(cost(1, 1), replace(DEVICE, gflops=0.0), 4, 3)


def test_deepest_prefix_that_fits_and_the_stages_that_fit_alone():
    # peaks: 640 + 1.45 * (saved + 20); 1000 are available, so saved may be 228 at most
    costs = [
        cost(1, 1, 100),
        cost(1, 2, 228),  # 640 + 359.6 = 999.6, up to 1000: just fits
        cost(1, 3, 229),  # 640 + 361.05 = 1001.05, up to 1002
        cost(1, 4, 300),
        cost(2, 2, 10),  # within exit 2 anyway
        cost(3, 3, 10),
        cost(4, 4, 400),
    ]
    choice = choose(costs)
    assert (choice.exit, choice.stages) == (2, (3,))
    assert choice.reason == "exit 3 needs 0.0 MiB, 0.0 MiB available (host)"
    assert [row.is_feasible for row in choice.rows] == [True, True, False, False, True, True, False]
    assert [row.peak_bytes for row in choice.rows[:3]] == [814, 1000, 1002]


def test_everything_fits():
    choice = choose([cost(1, 1), cost(1, 2), cost(2, 2)])
    assert (choice.exit, choice.stages) == (2, ())
    assert choice.reason == "exit 2 is the deepest of the model"


def test_a_deeper_exit_may_fit_where_a_shallower_does_not():
    assert choose([cost(1, 1, 900), cost(1, 2, 10)]).exit == 2


def test_nothing_fits_and_says_why():
    costs = [cost(1, 1), cost(1, 2), cost(2, 2)]
    profile = replace(DEVICE, memory_available_bytes=600, memory_bound="cap")
    choice = choose([replace(c, runtime_bytes=500 * 1024**2) for c in costs], profile)
    assert (choice.exit, choice.stages) == (0, ())
    assert choice.reason == "exit 1 needs 500.0 MiB, 0.0 MiB available (cap)"


def test_stage_1_alone_is_exit_1_and_never_a_stage():
    costs = [cost(1, 1, 900), cost(2, 2, 10)]
    assert (choose(costs).exit, choose(costs).stages) == (0, (2,))


@pytest.mark.parametrize(("deadline_s", "expected"), [(None, 2), (0.0, 2), (16.0, 2), (15.9, 1)])
def test_deadline(deadline_s, expected):
    # exit 1: 10 s as above; exit 2: 4 * (3 * 2e9 + 0.5e9) / 2e9 + 3 = 16 s
    costs = [cost(1, 1), cost(1, 2, flops_per_example=2e9)]
    assert choose(costs, deadline_s=deadline_s).exit == expected


def test_deadline_in_the_reason():
    costs = [cost(1, 1), cost(1, 2, saved_bytes=900, flops_per_example=2e9)]
    choice = choose(costs, deadline_s=12.0)
    assert choice.reason == (
        "exit 2 needs 0.0 MiB, 0.0 MiB available (host) and takes 16.0 s, the deadline is 12.0 s"
    )


def test_without_measured_compute_memory_decides_and_a_deadline_cannot_be_kept():
    profile = replace(DEVICE, gflops=0.0)
    assert choose([cost(1, 1)], profile).exit == 1
    assert choose([cost(1, 1)], profile).rows[0].seconds is None
    late = choose([cost(1, 1)], profile, deadline_s=60.0)
    assert late.exit == 0
    assert "without measured compute" in late.reason


def test_no_costs_are_refused():
    with pytest.raises(CapacityError, match="no exit was costed"):
        choose([cost(2, 2)])


@pytest.mark.parametrize("error", [MemoryError("8 GiB"), RuntimeError("can't allocate memory")])
def test_what_allocators_raise_is_a_capacity_error(error):
    said = "out of memory while testing: (8 GiB|can't)"
    with pytest.raises(CapacityError, match=said), memory_errors("while testing"):
        raise error


def test_other_runtime_errors_pass():
    with pytest.raises(RuntimeError, match="wrong shape"), memory_errors("while testing"):
        raise RuntimeError("wrong shape")
