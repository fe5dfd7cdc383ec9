"""Figures of tools/experiments: one PNG and the CSV behind it each.

    accuracy-*    accuracy of the served model's deepest exit over the rounds
    alpha-*       the same after training, against label skew
    rank-*        the same, against the rank k of the factorised hypernetwork
    weights-*     relative weight error of generated stages over the rounds, beside that of "use the
                  previous global": below it, a generator carries information
    deviations-*  the same of generators that predict how owners deviate from their mean: below 1
    exits-*       accuracy of every exit after training

Lines and bars are means over seeds, bands and whiskers one standard deviation, where there are
two seeds. A panel has at most MAX_LINES lines; colours are those of Okabe and Ito (2008), told
apart by colour-blind readers too, with a marker each for print in grey.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdk.errors import ConfigError
from tools.experiments.grids import BASELINE, BOUND, FULL_RANK
from tools.experiments.tables import (
    SETTING,
    Row,
    Run,
    all_rows,
    alpha_in_words,
    number,
    read_runs,
    write_csv,
)

MAX_LINES = 8
# their yellow is left out, too pale for a line on white; grey takes its place
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#808080")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")
SERVED = "accuracy of the served model's\ndeepest exit (%)"
ALPHAS_LAST = ("iid", "subject")


@dataclass(frozen=True)
class Point:
    x: float
    mean: float
    sd: float  # 0 with one seed
    seeds: int


@dataclass(frozen=True)
class Line:
    """A named series; style: place among colours and markers; a dashed one is a reference."""

    label: str
    points: Sequence[Point]
    style: int
    is_dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Axes:
    """What a figure's panels share. ticks: names of x, where x counts places."""

    x: str
    y: str
    ticks: Sequence[str] = ()
    is_log: bool = False  # y


def add_command(commands: Any) -> None:
    plot = commands.add_parser("plot", help="PNG figures and the CSV behind each")
    plot.add_argument("--out", type=Path, required=True, help="folder of results")
    plot.add_argument("--figures", type=Path, required=True, help="folder to write them to")
    plot.set_defaults(run=run_plot)


def run_plot(args: argparse.Namespace) -> int:
    runs, rows = read_runs(args.out), all_rows(args.out)
    pyplot()  # its absence is reported before any work
    args.figures.mkdir(parents=True, exist_ok=True)
    for setting in dict.fromkeys(setting_of(run.cell) for run in runs):
        here = [run for run in runs if setting_of(run.cell) == setting]
        of_setting = [row for row in rows if setting_of(row) == setting]
        name, title = "-".join(setting), in_words(setting)
        draw(args.figures / f"accuracy-{name}.png", accuracy_panels(here, title), ROUNDS_SERVED)
        panels = weight_panels(here, title, "error")
        draw(args.figures / f"weights-{name}.png", panels, ROUNDS_ERROR)
        panels = weight_panels(here, title, "deviation_error")
        draw(args.figures / f"deviations-{name}.png", panels, ROUNDS_DEVIATION)
        panels, axes = rank_panels(of_setting, title)
        draw(args.figures / f"rank-{name}.png", panels, axes)
        draw_bars(args.figures / f"exits-{name}.png", of_setting, title)
    for data, regime in dict.fromkeys((row["data"], row["regime"]) for row in rows):
        panels, axes = alpha_panels(rows, data, regime)
        draw(args.figures / f"alpha-{data}-{regime}.png", panels, axes)
    return 0


ROUNDS_SERVED = Axes("round", SERVED)
ROUNDS_ERROR = Axes("round", "weight error\n|predicted − trained| / |trained|", is_log=True)
ROUNDS_DEVIATION = Axes("round", "relative error of deviations\nfrom the owners' mean", is_log=True)


def setting_of(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    data, regime, alpha = (str(cell[key]) for key in SETTING)
    return data, regime, alpha


def in_words(setting: tuple[str, str, str]) -> str:
    data, regime, alpha = setting
    return f"{data}, {regime} groups, {alpha_in_words(alpha)}"


def accuracy_panels(runs: Sequence[Run], title: str) -> list[Panel]:
    """Best first, so that neighbours in rank share a panel."""
    curves = [
        (label, points)
        for label, group in by_label(runs).items()
        if (points := curve(group, served_final))
    ]
    curves.sort(key=lambda item: -item[1][-1].mean)
    return panels_of(curves, title)


def served_final(round: Mapping[str, Any]) -> float | None:
    accuracies = round.get("accuracy_served")
    return 100 * accuracies[-1] if accuracies else None


def weight_panels(runs: Sequence[Run], title: str, figure: str) -> list[Panel]:
    """A panel per stage and MAX_LINES / 2 rules; the reference is a rule's own global."""
    panels = []
    labels = by_label(runs)
    stages = {
        int(name.rpartition("_")[2])
        for run in runs
        for round in run.rounds
        for name in round.get("figures") or {}
        if name.startswith(f"{figure}_stage_")
    }
    for stage in sorted(stages):
        pairs = []
        for label, group in labels.items():
            error, previous = (
                curve(group, lambda round, name=f"{kind}_stage_{stage}": number(round, name))
                for kind in (figure, "previous")
            )
            if error:
                pairs.append((label, error, previous))
        for chunk in even_chunks(pairs, MAX_LINES // 2):
            lines = []
            for style, (label, error, previous) in enumerate(chunk):
                lines.append(Line(label, error, style))
                if previous:
                    lines.append(Line(f"{label}: previous global", previous, style, is_dashed=True))
            panels.append(Panel(f"{title}: stage {stage}", lines))
    return panels


def rank_panels(rows: Sequence[Row], title: str) -> tuple[list[Panel], Axes]:
    """Rules that were run at several ranks (labels but for the rank), and the baseline."""
    ranks = sorted({row["rank"] for row in rows if row["rank"] is not None})
    axes = Axes("rank k", SERVED, ["full" if k >= FULL_RANK else f"{k:.0f}" for k in ranks])
    if len(ranks) < 2:
        return [], axes
    groups: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        if row["rank"] is not None:
            groups.setdefault(row["label"].rpartition("-")[0], []).append(
                (float(ranks.index(row["rank"])), row)
            )
        elif row["label"] in (BASELINE, BOUND):
            groups.setdefault(row["label"], []).extend((float(i), row) for i in range(len(ranks)))
    curves = [(label, points_of(pairs)) for label, pairs in groups.items()]
    return panels_of(curves, title), axes


def alpha_panels(rows: Sequence[Row], data: str, regime: str) -> tuple[list[Panel], Axes]:
    here = [row for row in rows if (row["data"], row["regime"]) == (data, regime)]
    alphas = sorted({str(row["alpha"]) for row in here}, key=alpha_order)
    names = {"iid": "IID", "subject": "by subject"}
    axes = Axes("Dirichlet alpha of the labels", SERVED, [names.get(a, a) for a in alphas])
    if len(alphas) < 2:
        return [], axes
    groups: dict[str, list[tuple[float, Row]]] = {}
    for row in here:
        groups.setdefault(row["label"], []).append((float(alphas.index(str(row["alpha"]))), row))
    curves = [(label, points_of(pairs)) for label, pairs in groups.items()]
    curves = [(label, points) for label, points in curves if len(points) > 1]
    curves.sort(key=lambda item: -item[1][0].mean)  # at the strongest skew
    return panels_of(curves, f"{data}, {regime} groups"), axes


def alpha_order(alpha: str) -> tuple[int, float]:
    """Strongest skew first; what is no Dirichlet split last."""
    if alpha in ALPHAS_LAST:
        return 1 + ALPHAS_LAST.index(alpha), 0.0
    return 0, float(alpha)


def by_label(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.cell["label"], []).append(run)
    return groups


def curve(runs: Iterable[Run], value: Callable[[Mapping[str, Any]], float | None]) -> list[Point]:
    """Mean and spread over runs of each round's value; rounds without one are left out."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for round in run.rounds:
            if (held := value(round)) is not None:
                found.setdefault(float(round["round"]), []).append(held)
    return [point(x, values) for x, values in sorted(found.items())]


def points_of(pairs: Iterable[tuple[float, Row]]) -> list[Point]:
    """Served accuracy of rows at each x."""
    found: dict[float, list[float]] = {}
    for x, row in pairs:
        if row["served_final"] is not None:
            found.setdefault(x, []).append(row["served_final"])
    return [point(x, values) for x, values in sorted(found.items())]


def point(x: float, values: Sequence[float]) -> Point:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return Point(x, statistics.mean(values), sd, len(values))


def panels_of(curves: Sequence[tuple[str, Sequence[Point]]], title: str) -> list[Panel]:
    """The bound and the baseline in every panel, the others shared out in their order."""
    held = dict(curves)
    references = [
        Line(label, held[label], style, is_dashed=True)
        for label, style in ((BOUND, 0), (BASELINE, len(COLOURS) - 1))
        if label in held
    ]
    others = [item for item in curves if item[0] not in (BOUND, BASELINE)]
    chunks = even_chunks(others, MAX_LINES - len(references)) or ([[]] if references else [])
    first = 1 if references else 0  # the references have the first colour and the last
    return [
        Panel(title, [*references, *(Line(*item, first + i) for i, item in enumerate(chunk))])
        for chunk in chunks
    ]


def even_chunks(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """As few parts as hold at most `most` each, their sizes equal to one."""
    count = -(-len(items) // most)
    cuts = [round(i * len(items) / count) for i in range(count + 1)] if count else []
    return [items[a:b] for a, b in itertools.pairwise(cuts)]


def draw(path: Path, panels: Sequence[Panel], axes: Axes) -> None:
    """Panels one below another on the same scales, each with its legend beside it, if any."""
    if not panels:
        return
    plt = pyplot()
    shape = {"figsize": (9.5, 3.4 * len(panels)), "layout": "constrained"}
    sheet, grid = plt.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False, **shape)
    for panel, ax in zip(panels, grid[:, 0], strict=True):
        for line in panel.lines:
            draw_line(ax, line, bool(axes.ticks))
        ax.set_title(panel.title, loc="left", fontsize=10)
        ax.set_ylabel(axes.y)
        ax.set_xlabel(axes.x)
        ax.tick_params(labelbottom=True)
        ax.grid(alpha=0.3)
        ax.margins(x=0.02)
        if axes.is_log:
            log_scale(ax)
        if axes.ticks:
            ax.set_xticks(range(len(axes.ticks)), axes.ticks)
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    sheet.savefig(path, dpi=120)
    plt.close(sheet)
    rows = [
        {"panel": panel.title, "label": line.label, "x": name_of(p.x, axes), "mean": p.mean}
        | {"sd": p.sd if p.seeds > 1 else None, "seeds": p.seeds}
        for panel in panels
        for line in panel.lines
        for p in line.points
    ]
    write_csv(path.with_suffix(".csv"), rows)
    print(path)


def log_scale(ax: Any) -> None:
    """y as 0.1, 0.2, 0.5, 1, ...: powers of ten alone would leave a small range without a tick."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_yscale("log", nonpositive="clip")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def name_of(x: float, axes: Axes) -> str:
    return axes.ticks[int(x)] if axes.ticks else f"{x:g}"


def draw_line(ax: Any, line: Line, has_whiskers: bool) -> None:
    x = [p.x for p in line.points]
    mean, sd = [p.mean for p in line.points], [p.sd for p in line.points]
    colour = COLOURS[line.style]
    look = {"color": colour, "label": line.label, "linewidth": 1.4, "markersize": 4.5}
    if line.is_dashed:
        ax.plot(x, mean, linestyle="--", **look)
        return
    # by distance: rounds lie close together where every round is evaluated
    ax.plot(x, mean, marker=MARKERS[line.style], markevery=None if has_whiskers else 0.08, **look)
    if not any(sd):
        return
    if has_whiskers:
        ax.errorbar(x, mean, sd, fmt="none", ecolor=colour, capsize=3, linewidth=1)
        return
    low, high = ([m - s for m, s in zip(mean, sd, strict=True)] for sd in (sd, [-s for s in sd]))
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_bars(path: Path, rows: Sequence[Row], title: str) -> None:
    """Every rule's exits, best deepest exit on top."""
    names = [name for name in rows[0] if name.startswith("served_exit_")]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["label"], []).append(row)
    bars = {
        label: [point(i, held) for i, name in enumerate(names) if (held := held_by(group, name))]
        for label, group in groups.items()
    }
    bars = {label: points for label, points in bars.items() if points}
    if not bars:
        return
    order = sorted(bars, key=lambda label: bars[label][-1].mean)
    plt = pyplot()
    shape = {"figsize": (9.5, 1.2 + 0.42 * len(order)), "layout": "constrained"}
    sheet, ax = plt.subplots(**shape)
    height = 0.8 / len(names)
    for exit in range(len(names)):
        held = [(y, p) for y, label in enumerate(order) for p in bars[label] if p.x == exit]
        ax.barh(
            [y + 0.4 - (exit + 0.5) * height for y, _ in held],
            [p.mean for _, p in held],
            height,
            xerr=[p.sd for _, p in held] if any(p.sd for _, p in held) else None,
            color=COLOURS[(2, 4, 1, 5, 3, 6, 7, 0)[exit % len(COLOURS)]],
            error_kw={"linewidth": 1, "capsize": 2},
            label=f"exit {exit + 1}",
        )
    ax.set_yticks(range(len(order)), order, fontsize=8)
    ax.set_xlabel("accuracy of the served model (%)")
    ax.set_title(title, loc="left", fontsize=10)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    ax.set_ylim(-0.5, len(order) - 0.5)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    sheet.savefig(path, dpi=120)
    plt.close(sheet)
    write_csv(
        path.with_suffix(".csv"),
        [
            {"label": label, "exit": int(p.x) + 1, "mean": p.mean}
            | {"sd": p.sd if p.seeds > 1 else None, "seeds": p.seeds}
            for label in reversed(order)
            for p in bars[label]
        ],
    )
    print(path)


def held_by(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files. Raises ConfigError if it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigError("figures need matplotlib; install it: pip install matplotlib") from error
    return plt
