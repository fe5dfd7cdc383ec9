"""Heat, throttling and battery from made-up /sys trees, and what work they allow."""

import pytest
from msgspec.structs import replace

from edge_sdk.hardware import conditions
from edge_sdk.hardware.conditions import (
    FULL,
    Allowance,
    Conditions,
    Zone,
    allowed,
    in_words,
    read,
    slowed,
)
from tests.support.devices import PROFILE
from tests.support.examples import lay_out
from tests.support.jtop_fake import JtopException, fake_jtop, orin, refuses

THERMAL = "sys/class/thermal"
POWER = "sys/class/power_supply"
CPU = "sys/devices/system/cpu"
PI_FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"
PI = {
    f"{THERMAL}/thermal_zone0/type": "cpu-thermal",
    f"{THERMAL}/thermal_zone0/temp": 51121,
    f"{THERMAL}/thermal_zone0/trip_point_0_type": "critical",
    f"{THERMAL}/thermal_zone0/trip_point_0_temp": 110000,
    PI_FLAGS: "0",
}
XAVIER = {
    f"{THERMAL}/thermal_zone0/type": "CPU-therm",
    f"{THERMAL}/thermal_zone0/temp": 42500,
    f"{THERMAL}/thermal_zone0/trip_point_0_type": "critical",
    f"{THERMAL}/thermal_zone0/trip_point_0_temp": 105000,
    f"{THERMAL}/thermal_zone0/trip_point_1_type": "passive",
    f"{THERMAL}/thermal_zone0/trip_point_1_temp": 99000,
    f"{THERMAL}/thermal_zone0/trip_point_2_type": "passive",
    f"{THERMAL}/thermal_zone0/trip_point_2_temp": 86000,
    f"{THERMAL}/thermal_zone1/type": "PMIC-Die",
    f"{THERMAL}/thermal_zone1/temp": 100000,
    f"{THERMAL}/thermal_zone1/trip_point_0_type": "critical",
    f"{THERMAL}/thermal_zone1/trip_point_0_temp": 100000,
    f"{THERMAL}/thermal_zone10/type": "GPU-therm",
    f"{THERMAL}/thermal_zone10/temp": -256000,  # switched off
    f"{THERMAL}/thermal_zone2/type": "thermal-fan-est",
    f"{THERMAL}/thermal_zone2/temp": 43000,
    f"{THERMAL}/thermal_zone2/trip_point_0_type": "active",
    f"{THERMAL}/thermal_zone2/trip_point_0_temp": 46000,
    f"{THERMAL}/cooling_device0/type": "pwm-fan",
    f"{THERMAL}/cooling_device0/cur_state": 3,
    f"{THERMAL}/cooling_device1/type": "cpu-balanced",
    f"{THERMAL}/cooling_device1/cur_state": 0,
    "sys/devices/gpu.0/load": 455,
}


# -- reading --------------------------------------------------------------------------------------


def test_a_raspberry_pi(tmp_path):
    now = read(lay_out(tmp_path, PI))
    assert now == Conditions(
        zones=(Zone("cpu-thermal", 51.121, 80.0, 110.0),),
        is_throttled=False,
        is_under_voltage=False,
    )


@pytest.mark.parametrize(
    ("flags", "is_throttled", "is_under_voltage"),
    [
        ("0", False, False),
        ("1", False, True),
        ("2", True, False),  # clock capped
        ("4", True, False),
        ("8", True, False),  # soft temperature limit
        ("50005", True, True),
        ("0x50005", True, True),
        ("f0000", False, False),  # all of it happened before
        ("", None, None),
        ("throttled", None, None),
        ("-1", None, None),
        ("fffffffff", None, None),
    ],
)
def test_flags_of_the_firmware(tmp_path, flags, is_throttled, is_under_voltage):
    now = read(lay_out(tmp_path, PI | {PI_FLAGS: flags}))
    assert (now.is_throttled, now.is_under_voltage) == (is_throttled, is_under_voltage)
    assert now.zones[0].throttle_c == (None if is_throttled is None else 80.0)


def test_a_jetson(tmp_path):
    now = read(lay_out(tmp_path, XAVIER))
    assert now == Conditions(
        zones=(Zone("CPU-therm", 42.5, 86.0, 105.0), Zone("thermal-fan-est", 43.0)),
        is_throttled=False,  # the fan's state is none
        gpu_percent=45.5,
    )
    assert allowed(now) == FULL
    slow = read(lay_out(tmp_path, {f"{THERMAL}/cooling_device1/cur_state": 2}))
    assert slow.is_throttled
    assert allowed(slow) == Allowance("short", "the board is throttled")


def test_an_empty_tree_is_unknown_and_allows_full_work(tmp_path):
    assert read(tmp_path) == Conditions()
    assert allowed(read(tmp_path)) == FULL
    assert in_words(read(tmp_path)) == "nothing known: full work"


def test_this_machine_can_be_read():
    assert isinstance(conditions.read(), Conditions)


@pytest.mark.parametrize(
    ("temp", "celsius"),
    [("-12000", -12.0), ("0", 0.0), ("-274000", None), ("250000", None), ("hot", None), ("", None)],
)
def test_strange_temperatures_are_unknown(tmp_path, temp, celsius):
    now = read(lay_out(tmp_path, PI | {f"{THERMAL}/thermal_zone0/temp": temp}))
    assert [zone.celsius for zone in now.zones] == ([] if celsius is None else [celsius])
    assert allowed(now) == FULL


@pytest.mark.parametrize("trip", ["0", "-274000", "20000", "900000", "none", ""])
@pytest.mark.parametrize("kind", ["critical", "passive"])
def test_strange_trips_are_none(tmp_path, kind, trip):
    zone = f"{THERMAL}/thermal_zone0"
    files = {f"{zone}/type": "acpitz", f"{zone}/temp": 39000, f"{zone}/trip_point_0_type": kind}
    now = read(lay_out(tmp_path, files | {f"{zone}/trip_point_0_temp": trip}))
    assert now.zones == (Zone("acpitz", 39.0),)


def test_a_zone_without_a_type_or_with_a_folder_for_a_file(tmp_path):
    lay_out(tmp_path, {f"{THERMAL}/thermal_zone3/temp": 41000})
    (tmp_path / THERMAL / "thermal_zone3" / "type").mkdir()
    lay_out(tmp_path, {f"{THERMAL}/thermal_zone4/temp/what": 41000})
    assert read(tmp_path).zones == (Zone("thermal_zone3", 41.0),)


def battery(number: int, **files: object) -> dict[str, object]:
    return {f"{POWER}/BAT{number}/{n}": text for n, text in ({"type": "Battery"} | files).items()}


@pytest.mark.parametrize(
    ("files", "percent", "is_discharging", "power_w"),
    [
        (battery(0, capacity=55, status="Discharging", power_now=7500000), 55.0, True, 7.5),
        (battery(0, capacity=55, status="Charging", power_now=7500000), 55.0, False, None),
        (battery(0, capacity="abc", status="Discharging"), None, True, None),
        (battery(0, capacity=101, status="Full"), None, False, None),
        (battery(0, capacity=-3, status="what?"), None, None, None),
        (battery(0, capacity=5), 5.0, None, None),
        (battery(0, capacity=3, status="Discharging", scope="Device"), None, None, None),  # a mouse
        ({f"{POWER}/AC/type": "Mains", f"{POWER}/AC/online": 1}, None, None, None),
        # of two, one is drained first
        (
            battery(0, capacity=4, status="Discharging") | battery(1, capacity=96, status="Full"),
            50.0,
            True,
            None,
        ),
    ],
)
def test_battery(tmp_path, files, percent, is_discharging, power_w):
    now = read(lay_out(tmp_path, files))
    assert (now.battery_percent, now.is_discharging, now.power_w) == (
        percent,
        is_discharging,
        power_w,
    )


def clock(core: int, now: object, most: object = 1500000, **more: object) -> dict[str, object]:
    files = {"scaling_cur_freq": now, "cpuinfo_max_freq": most, "cpuinfo_min_freq": 600000} | more
    return {f"{CPU}/cpu{core}/cpufreq/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "share"),
    [
        (clock(0, 1000000) | clock(1, 900000), 2 / 3),  # the least slowed core
        (clock(0, 600000), None),  # at its least an idle core is not to be told from a slowed one
        (clock(0, 600000, scaling_max_freq=1200000), 0.8),  # but a limit is
        (clock(0, 1500000, scaling_max_freq=1500000), 1.0),
        (clock(0, 1600000), None),
        (clock(0, "fast"), None),
        (clock(0, 1000000, most="abc"), None),
        (clock(0, 1000000, most=0), None),
        ({}, None),
    ],
)
def test_clock_share(tmp_path, files, share):
    now = read(lay_out(tmp_path, PI | {PI_FLAGS: "4"} | files))
    assert now.clock_share == (None if share is None else pytest.approx(share))
    idle = read(lay_out(tmp_path, {PI_FLAGS: "0"}))
    assert idle.clock_share is None  # an idle governor is not throttling


def test_jetson_stats_adds_power_and_gpu(monkeypatch, tmp_path):
    fake_jtop(monkeypatch, orin)
    lay_out(tmp_path, XAVIER)
    assert read(tmp_path).power_w is None  # not asked on a heartbeat
    now = read(tmp_path, with_jetson_stats=True)
    assert (now.power_w, now.gpu_percent, now.problem) == (5.12, 12.5, "")
    assert now.zones == read(tmp_path).zones  # these have limits, jtop's have none
    bare = read(tmp_path / "nothing", with_jetson_stats=True)
    assert bare.zones == (Zone("cpu", 51.5),)


def test_jetson_stats_that_refuses_leaves_what_sysfs_says(monkeypatch, tmp_path):
    fake_jtop(monkeypatch, refuses(JtopException("The jtop.service is not active.")))
    now = read(lay_out(tmp_path, XAVIER), with_jetson_stats=True)
    assert now.problem == "jetson-stats: The jtop.service is not active."
    assert replace(now, problem="") == read(tmp_path)


# -- what it allows -------------------------------------------------------------------------------


def at(celsius: float) -> Conditions:
    return Conditions(zones=(Zone("CPU", celsius, 80.0, 100.0),))


def left(percent: float | None, is_discharging: bool | None = True) -> Conditions:
    return Conditions(battery_percent=percent, is_discharging=is_discharging)


@pytest.mark.parametrize(
    ("now", "before", "work"),
    [
        # short from 3 degrees below 80, full again below 72
        (at(76.9), "full", "full"),
        (at(77.0), "full", "short"),
        (at(72.0), "short", "short"),
        (at(71.9), "short", "full"),
        # none from 3 degrees below 100, more again below 92
        (at(96.9), "full", "short"),
        (at(97.0), "short", "none"),
        (at(92.0), "none", "none"),
        (at(91.9), "none", "short"),
        (at(72.0), "none", "short"),
        (at(71.9), "none", "full"),
        (at(-20.0), "full", "full"),
        # short below 30 %, full again from 35; none below 10, more again from 15
        (left(30), "full", "full"),
        (left(29), "full", "short"),
        (left(34), "short", "short"),
        (left(35), "short", "full"),
        (left(9), "short", "none"),
        (left(14), "none", "none"),
        (left(15), "none", "short"),
        (left(5, is_discharging=False), "none", "full"),  # it charges
        (left(5, is_discharging=None), "full", "full"),
        (left(None), "full", "full"),
        (Conditions(is_throttled=True), "full", "short"),
        (Conditions(is_throttled=False), "short", "full"),
        (Conditions(is_under_voltage=True), "full", "full"),  # the doctor's, nothing is slowed
    ],
)
def test_work_allowed(now, before, work):
    assert allowed(now, before).work == work
    assert bool(allowed(now, before).reason) == (work != "full")


def test_it_does_not_flap_around_a_limit():
    work, seen = "full", []
    for celsius in (76, 77, 76, 78, 75, 77, 73, 71, 76, 77):
        work = allowed(at(celsius), work).work
        seen.append(work)
    assert seen == ["full", *["short"] * 6, "full", "full", "short"]


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (at(78.4), "CPU is at 78 °C, it is slowed at 80 °C"),
        (at(99), "CPU is at 99 °C, it is switched off at 100 °C"),
        (left(9), "the battery is at 9 % and discharging"),
        (Conditions(is_throttled=True), "the board is throttled"),
    ],
)
def test_reasons_in_words(now, reason):
    assert allowed(now).reason == reason


def test_in_words():
    now = Conditions(
        zones=(Zone("CPU", 50.0), Zone("GPU", 61.2)),
        is_throttled=True,
        is_under_voltage=True,
        battery_percent=20,
        is_discharging=False,
        power_w=5.12,
        gpu_percent=3.0,
        problem="jtop?",
    )
    assert in_words(now) == (
        "GPU 61 °C, throttled, under-voltage, battery 20 %, not discharging, 5.1 W, GPU 3 % busy, "
        "jtop?: short work, as the board is throttled"
    )


@pytest.mark.parametrize(
    ("is_throttled", "share", "gflops"),
    [
        (True, 0.64, 6.0),  # of 10, to tenths
        (True, 0.02, 1.0),
        (True, None, 10.0),
        (False, 0.6, 10.0),
        (None, None, 10.0),
    ],
)
def test_slowed(is_throttled, share, gflops):
    now = Conditions(is_throttled=is_throttled, clock_share=share)
    assert slowed(PROFILE, now).gflops == pytest.approx(gflops)
    assert slowed(PROFILE, now).layer_s * gflops == pytest.approx(PROFILE.layer_s * PROFILE.gflops)
