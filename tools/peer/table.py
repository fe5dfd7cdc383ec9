"""Rows of tools/peer: to the terminal, as Markdown, to a file and back; the verdict."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.tables import made_by, read_csv, write_csv

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / "build" / "peer-venv"  # Flower's


def judge(rows: list[dict[str, object]]) -> None:
    """The aim at 50 MB x 16: CURVE 8 times faster than Flower's gRPC with 5 % of its memory."""
    cells = {str(r["system"]): r for r in rows if (str(r["MB"]), str(r["clients"])) == ("50", "16")}
    if not {"curve", "flower-grpc"} <= set(cells):
        return
    ours, theirs = cells["curve"], cells["flower-grpc"]

    def share(name: str) -> float:
        return float(str(ours[name])) / float(str(theirs[name]))

    faster, peak, growth = 1 / share("round_s"), share("server_peak_MB"), share("server_growth_MB")
    print(
        f"50 MB x 16, CURVE against Flower's gRPC: {faster:.1f} times faster per round (aim 8: "
        f"{reached(faster >= 8)}); server memory {peak:.1%} of its peak (aim 5 %: "
        f"{reached(peak <= 0.05)}), {growth:.1%} of its growth over base"
    )


def markdown(rows: list[dict[str, object]]) -> str:
    """The main columns, as docs/results/peer.md shows them."""
    lines = [
        "| MB x clients | system | s a round | of the floor | CPU s server, clients "
        "| server MB (growth) | largest client MB | wire MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['MB']} x {r['clients']} | {r['system']} | {r['round_s']} | {r['over_floor']} "
        f"| {r['server_cpu_s']}, {r['clients_cpu_s']} | {r['server_peak_MB']} "
        f"({r['server_growth_MB']}) | {r['client_peak_MB']} | {r['wire_MB']} |"
        for r in rows
    ]
    return "\n".join(lines)


def reached(is_reached: bool) -> str:
    return "reached" if is_reached else "not reached"


def print_row(row: dict[str, object], *, is_first: bool) -> None:
    if is_first:
        print("  ".join(f"{name:>{width(name)}}" for name in row))
    print("  ".join(f"{value!s:>{width(name)}}" for name, value in row.items()), flush=True)


def width(name: str) -> int:
    return 16 if name == "system" else max(7, len(name))


def read_rows(path: Path) -> list[dict[str, str]]:
    return read_csv(path) if path.exists() else []


def write_rows(path: Path, rows: Sequence[Mapping[str, object]], argv: Sequence[str]) -> None:
    if rows:
        command = f"python -m tools.peer {' '.join(argv)}"
        about = (f"Python {platform.python_version()}", versions())
        write_csv(path, rows, made_by(command, *about))


def versions() -> str:
    """What decides about the wire on both sides."""
    import zmq

    ours = f"libzmq {zmq.zmq_version()}, pyzmq {zmq.__version__}"
    python = VENV / "bin" / "python"
    if not python.exists():
        return ours

    def say(*command: str) -> str:
        done = subprocess.run([python, *command], capture_output=True, text=True, check=False)
        return "; ".join(done.stdout.strip().splitlines())

    ask = "from importlib.metadata import version as v; print(v('flwr'), v('grpcio'), v('numpy'))"
    flwr, grpc, numpy = say("-c", ask).split()
    lacks = say("-m", "pip", "check")  # an installation by hand may not be what Flower asks for
    return f"flwr {flwr} (grpcio {grpc}, numpy {numpy}; {lacks}), {ours}"
