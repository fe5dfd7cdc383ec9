"""Heat, throttling, battery: what this device measures of itself, and how much work that allows.

A device that is hot or runs down does less instead of breaking: `allowed` says full, short (no
deeper stages beside the prefix) or none, with the reason in words. It is asked while the device is
idle; a job that runs goes on. All is read from /sys, cheap enough for every heartbeat; on a Jetson
`read(with_jetson_stats=True)` adds what jetson-stats knows beside it, power draw and GPU load,
which decide nothing. What cannot be read, or reads as nonsense, is unknown and allows full work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from edge_sdk.hardware.jetson import jetson_stats
from edge_sdk.hardware.procfs import ROOT, folders, read_int, read_text
from edge_sdk.protocol.messages import DeviceProfile

Work: TypeAlias = Literal["full", "short", "none"]

NEAR_C = 3.0  # so close below a trip it acts as reached
COOLER_C = 5.0  # it must cool so much further before the work grows again
SHORT_PERCENT = 30  # of a battery that discharges
NONE_PERCENT = 10
RECHARGED_PERCENT = 5  # more than that, likewise
SENSIBLE_C = (-60.0, 200.0)  # sensors that are off give -256 or -274 degrees
LEAST_TRIP_C = 40.0  # a trip that is not set reads 0 or -274
# The firmware of every Raspberry Pi slows the cores from here on, which no trip point says:
# Raspberry Pi documentation, "Frequency management and thermal control".
PI_THROTTLE_C = 80.0
# Bits of get_throttled as they are now; bit 1, a capped clock, and 3, the soft temperature limit,
# slow the cores like bit 2.
PI_UNDER_VOLTAGE, PI_THROTTLED = 0b1, 0b1110
# Cooling devices that work by slowing the processor; others are fans. "balanced": Jetsons.
SLOWING = re.compile("(thermal-)?(cpufreq|devfreq)|processor|(cpu|gpu)-(balanced|throttle)")
BATTERY_STATES = ("Charging", "Discharging", "Not charging", "Full")  # else not known
FIXED = "PMIC"  # a sensor of the Jetson Nano and TX that always gives 100 degrees
GPU_LOADS = ("sys/devices/gpu.0/load", "sys/devices/platform/gpu.0/load")


class Zone(msgspec.Struct, frozen=True):
    """One sensor and its lowest limits, degrees Celsius."""

    name: str
    celsius: float
    throttle_c: float | None = None  # from here on the kernel or firmware slows the board
    critical_c: float | None = None  # here it is switched off


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """What the device measures of itself; None: not known. clock_share: the share of the full clock
    that a throttled board has left, None if it is not throttled."""

    zones: tuple[Zone, ...] = ()
    is_throttled: bool | None = None
    clock_share: float | None = None
    is_under_voltage: bool | None = None
    battery_percent: float | None = None
    is_discharging: bool | None = None
    power_w: float | None = None
    gpu_percent: float | None = None
    problem: str = ""  # why jetson-stats tells nothing


class Allowance(msgspec.Struct, frozen=True):
    """How much work the conditions allow. reason: why not all of it."""

    work: Work = "full"
    reason: str = ""


FULL = Allowance()


def allowed(now: Conditions, before: Work = "full") -> Allowance:
    """How much work these conditions allow. before: what was allowed last. What was taken back is
    given again only a good deal further from the limit, so that it does not change to and fro."""
    if reason := _reason(now, "none", is_held=before == "none"):
        return Allowance("none", reason)
    if reason := _reason(now, "short", is_held=before != "full"):
        return Allowance("short", reason)
    return FULL


def _reason(now: Conditions, work: Literal["short", "none"], *, is_held: bool) -> str:
    """Why no more than this work is allowed; "" if nothing speaks against more."""
    margin_c = NEAR_C + COOLER_C * is_held
    for zone in now.zones:
        trip_c = zone.throttle_c if work == "short" else zone.critical_c
        if trip_c is not None and zone.celsius >= trip_c - margin_c:
            what = "it is slowed" if work == "short" else "it is switched off"
            return f"{zone.name} is at {zone.celsius:.0f} °C, {what} at {trip_c:.0f} °C"
    least = (SHORT_PERCENT if work == "short" else NONE_PERCENT) + RECHARGED_PERCENT * is_held
    battery = now.battery_percent
    if now.is_discharging and battery is not None and battery < least:
        return f"the battery is at {battery:.0f} % and discharging"
    if work == "short" and now.is_throttled:
        return "the board is throttled"
    return ""


def slowed(profile: DeviceProfile, now: Conditions) -> DeviceProfile:
    """The profile at the clock that throttling leaves, so that predicted seconds grow. To tenths,
    or every heartbeat would tell the coordinator other seconds."""
    if not now.is_throttled or now.clock_share is None:
        return profile
    share = max(0.1, round(now.clock_share, 1))
    return replace(profile, gflops=profile.gflops * share, layer_s=profile.layer_s / share)


def in_words(now: Conditions) -> str:
    """What is known of the conditions, and what work they allow, as one line for a person."""
    parts = []
    if now.zones:
        hottest = max(now.zones, key=lambda zone: zone.celsius)
        parts.append(f"{hottest.name} {hottest.celsius:.0f} °C")
    if now.is_throttled is not None:
        parts.append("throttled" if now.is_throttled else "not throttled")
    parts += ["under-voltage"] if now.is_under_voltage else []
    if now.battery_percent is not None:
        state = "discharging" if now.is_discharging else "not discharging"
        parts.append(f"battery {now.battery_percent:.0f} %, {state}")
    parts += [] if now.power_w is None else [f"{now.power_w:.1f} W"]
    parts += [] if now.gpu_percent is None else [f"GPU {now.gpu_percent:.0f} % busy"]
    parts += [now.problem] if now.problem else []
    allowance = allowed(now)
    amount = "no" if allowance.work == "none" else allowance.work
    work = f"{amount} work" + (f", as {allowance.reason}" if allowance.reason else "")
    return f"{', '.join(parts) or 'nothing known'}: {work}"


# -- reading --------------------------------------------------------------------------------------


def read(root: Path = ROOT, *, with_jetson_stats: bool = False) -> Conditions:
    """The conditions now. with_jetson_stats: ask jtop too, if installed, which takes a second."""
    flags = _pi_flags(root)
    zones = tuple(_zones(root, PI_THROTTLE_C if flags is not None else None))
    is_throttled = _is_slowed(root) if flags is None else bool(flags & PI_THROTTLED)
    percent, is_discharging, power_w = _battery(root)
    now = Conditions(
        zones=zones,
        is_throttled=is_throttled,
        clock_share=_clock_share(root) if is_throttled else None,
        is_under_voltage=None if flags is None else bool(flags & PI_UNDER_VOLTAGE),
        battery_percent=percent,
        is_discharging=is_discharging,
        power_w=power_w,
        gpu_percent=_gpu_percent(root),
    )
    if not with_jetson_stats:
        return now
    told = jetson_stats()
    return replace(
        now,
        zones=zones or tuple(Zone(name, celsius) for name, celsius in told.temperatures.items()),
        power_w=now.power_w if told.power_w is None else told.power_w,
        gpu_percent=now.gpu_percent if told.gpu_percent is None else told.gpu_percent,
        problem=told.problem,
    )


def _zones(root: Path, default_throttle_c: float | None) -> Iterator[Zone]:
    for folder in folders(root, "sys/class/thermal", "thermal_zone*"):
        celsius = _celsius(folder / "temp")
        name = read_text(folder / "type") or folder.name
        if celsius is None or name.startswith(FIXED):
            continue
        trips: dict[str, float] = {}
        for file in folders(folder, ".", "trip_point_*_type"):
            kind = read_text(file)
            trip_c = _celsius(file.with_name(file.name.replace("_type", "_temp")))
            if trip_c is not None and trip_c >= LEAST_TRIP_C:
                trips[kind] = min(trip_c, trips.get(kind, trip_c))
        yield Zone(name, celsius, trips.get("passive", default_throttle_c), trips.get("critical"))


def _celsius(file: Path) -> float | None:
    """Degrees of a file that holds thousandths; None: it cannot be read, or it is nonsense."""
    thousandths = read_int(file)
    if thousandths is None or not SENSIBLE_C[0] <= thousandths / 1000 <= SENSIBLE_C[1]:
        return None
    return thousandths / 1000


def _pi_flags(root: Path) -> int | None:
    """The bits of get_throttled of a Raspberry Pi's firmware; None on other boards."""
    for folder in folders(root, "sys/devices/platform", "soc*/*firmware"):
        try:
            flags = int(read_text(folder / "get_throttled"), 16)
        except ValueError:
            continue
        if 0 <= flags < 2**32:
            return flags
    return None


def _is_slowed(root: Path) -> bool | None:
    """Whether the kernel's thermal control slows a processor now."""
    states = [
        read_int(folder / "cur_state")
        for folder in folders(root, "sys/class/thermal", "cooling_device*")
        if SLOWING.match(read_text(folder / "type").lower())
    ]
    known = [state for state in states if state is not None]
    return any(state > 0 for state in known) if known else None


def _clock_share(root: Path) -> float | None:
    """Clock over full clock of the least slowed core.

    A limit set below the maximum counts. Without one the clock itself does, unless it is the least
    there is: an idle core's governor chooses that, whether the board is throttled or not."""
    shares = []
    for folder in folders(root, "sys/devices/system/cpu", "cpu[0-9]*/cpufreq"):
        names = ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_min_freq", "cpuinfo_max_freq")
        now, limit, least, most = (read_int(folder / name) for name in names)
        if most is None or most <= 0:
            continue
        if limit is not None and 0 < limit < most:
            shares.append(limit / most)
        elif now is not None and (least or 0) < now <= most:
            shares.append(now / most)
    return max(shares, default=None)


def _battery(root: Path) -> tuple[float | None, bool | None, float | None]:
    """Percent left, whether it discharges, and its watts then; of several the mean and the sum. A
    mouse's battery (scope Device) is none of this device."""
    percents, states, watts = [], [], []
    for folder in folders(root, "sys/class/power_supply", "*"):
        if read_text(folder / "type") != "Battery" or read_text(folder / "scope") == "Device":
            continue
        percent, microwatts = read_int(folder / "capacity"), read_int(folder / "power_now")
        state = read_text(folder / "status")
        if percent is not None and 0 <= percent <= 100:
            percents.append(percent)
        if state in BATTERY_STATES:
            states.append(state == "Discharging")
        if microwatts is not None and state == "Discharging":
            watts.append(abs(microwatts) / 1e6)
    percent_left = sum(percents) / len(percents) if percents else None
    return percent_left, any(states) if states else None, sum(watts) if watts else None


def _gpu_percent(root: Path) -> float | None:
    """The load of a Jetson's GPU, whose file counts in thousandths; None on other boards."""
    for name in GPU_LOADS:
        load = read_int(root / name)
        if load is not None and 0 <= load <= 1000:
            return load / 10
    return None
