"""What devices say of themselves, bounded to the plausible before it is stored, shown or chosen by.

A figure beyond these bounds is a mistake or a lie; the device keeps its place and the nearest bound
stands for it. The wire's own bounds are wider (docs/protocol.md): they keep frames well formed."""

from __future__ import annotations

import logging

from msgspec.structs import replace

from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import Hello, Ready, Update
from edge_sdk.tasks.metrics import METRICS

log = logging.getLogger(__name__)
LONGEST_S = 7 * 86_400.0  # that anything of a round takes
MOST_LOSS = 1e6  # nats
MOST_SQUARE = 1e30  # of an error, as a loss: labels are below 1e15
MOST_TEXT = 60  # characters of a name
# Above every machine that trains one device's share, below every board: from, to.
PLAUSIBLE: dict[str, tuple[float, float]] = {
    "memory_total_bytes": (0, 2**44),
    "memory_available_bytes": (0, 2**44),
    "cores": (0.01, 1024),
    "gflops": (0, 1e6),
    "layer_s": (0, 1),
    "link_mbit_s": (1e-3, 1e6),
    "cpu_scale": (1e-4, 1e4),
}


def plausible_hello(hello: Hello) -> Hello:
    """The hello as the coordinator goes by it; what was bounded is logged."""
    profile = hello.profile
    changes: dict[str, object] = {
        field: _within(getattr(profile, field), *bounds) for field, bounds in PLAUSIBLE.items()
    }
    changes |= {f: _name(getattr(profile, f)) for f in ("platform", "board", "machine")}
    if not profile.is_emulated:
        changes["cpu_scale"] = None
    bounded = replace(profile, **changes)
    fields = [f for f in changes if getattr(bounded, f) != getattr(profile, f)]
    if fields:
        said = ", ".join(f"{f} {one_line(str(getattr(profile, f)), MOST_TEXT)}" for f in fields)
        log.warning("%s says of itself %s: bounded to the plausible", hello.client_id, said)
    available = min(bounded.memory_available_bytes, bounded.memory_total_bytes or 2**44)
    return replace(hello, profile=replace(bounded, memory_available_bytes=available))


def plausible_ready(ready: Ready) -> Ready:
    stage_s = tuple(min(seconds, LONGEST_S) for seconds in ready.stage_s)
    return replace(ready, prefix_s=min(ready.prefix_s, LONGEST_S), stage_s=stage_s)


def plausible_update(update: Update, task: Task = "classify") -> Update:
    """task: of the model. Losses were checked to be finite."""
    most = MOST_SQUARE if METRICS[task].is_lower_better else MOST_LOSS
    phases = {
        name: replace(
            phase,
            wall_s=min(phase.wall_s, LONGEST_S),
            cpu_s=None if phase.cpu_s is None else min(phase.cpu_s, 1024 * LONGEST_S),
        )
        for name, phase in update.phases.items()
    }
    exits = tuple(replace(e, loss=_within(e.loss, 0.0, most)) for e in update.exits)
    holdout = update.holdout
    if holdout:
        holdout = replace(holdout, loss=_within(holdout.loss, 0.0, most))
    peak = min(update.peak_memory_bytes, 2**44)
    return replace(update, phases=phases, exits=exits, holdout=holdout, peak_memory_bytes=peak)


def _within(figure: float | None, least: float, most: float) -> float | None:
    """The figure, or the bound that is nearest; its type stays."""
    if figure is None or least <= figure <= most:
        return figure
    return type(figure)(least if figure < least else most)


def _name(text: str) -> str:
    """Text of a peer as it is shown: what does not print escaped, and short."""
    return one_line(text.strip(), MOST_TEXT)
