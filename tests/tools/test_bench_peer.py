"""What the peer benchmark sees and says; its systems themselves are run by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.peer import __main__ as peer
from tools.peer.processes import TICK_S, Tree, children_of_all

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
sys.stdin.readline()
child.communicate(b"end")
"""
CHILD = """
import sys
held = bytearray(b"x" * 80_000_000)
while __import__("time").process_time() < 0.3: pass
print("ready", flush=True)
sys.stdin.readline()
"""


def row(system: str, round_s: float, peak: int, growth: int) -> dict[str, object]:
    return {
        "system": system,
        "MB": 50,
        "clients": 16,
        "round_s": round_s,
        "server_peak_MB": peak,
        "server_growth_MB": growth,
    }


def test_a_tree_counts_what_its_children_hold_and_burn() -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = Tree(process.pid)
        tree.look(children_of_all())
        assert len(tree.pids) == 2
        assert tree.peak_bytes >= tree.rss_bytes > 80_000_000
        assert tree.cpu_s() >= 0.3 - 2 * TICK_S  # which the kernel rounds to, for each of both
        assert not tree.is_over
        process.communicate(b"end\n")
    assert tree.is_over  # the root, not what it left


@pytest.mark.parametrize(
    ("round_s", "peak", "said"),
    [
        (2.0, 250, ["10.0 times", "aim 8: reached", "aim 5 %: reached"]),
        (4.0, 400, ["5.0 times", "aim 8: not reached", "aim 5 %: not reached"]),
    ],
)
def test_the_aim_is_judged_by_the_absolute_peak(
    round_s: float, peak: int, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    peer.judge([row("curve", round_s, peak, 60), row("flower-grpc", 20.0, 6000, 5900)])
    printed = capsys.readouterr().out
    assert all(text in printed for text in said), printed
    assert "1.0% of its growth" in printed


def test_without_both_systems_nothing_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    peer.judge([row("curve", 2.0, 250, 60)])
    assert capsys.readouterr().out == ""


def test_a_cell_that_does_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "available_bytes", lambda: 8 * 10**9)
    with pytest.raises(peer.CellError, match=r"8\.0 GB are free, about 20 GB are needed"):
        peer.run_cell("flower-grpc", 50, 16, 3)
