"""The scripted coordinator of tools/conformance: a device that follows docs/protocol.md passes, and
one that does not is told what it breaks."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tools.conformance.__main__ import main
from tools.conformance.scenarios import SCENARIOS

MINIMAL = ROOT / "examples" / "minimal_device.py"
PLACES = "{endpoint} {name} {data} {keys}"
# By scenario: what of the minimal device is spoilt, and what the report says then.
MUTANTS: dict[str, tuple[str, str, str]] = {
    "probe": ('elif tag == "probe":', 'elif tag == "prob":', "no answer to a probe"),
    "trains_a_prefix": ("z.var(0, ddof=1)", "z.var(0)", "running_var ends"),
    "trains_by_adam": ("0.9 * m + 0.1 *", "0.8 * m + 0.2 *", "from where it should"),
    "trains_one_stage": ("stage, inputs, False)", "stage, inputs, True)", "from where it should"),
    "trains_two_segments": ('-each["first"]', 'each["first"]', "from where it should"),
    "trains_in_batches": ("min(3, size)", "min(1, size)", "num_steps 6, expected 4"),
    "credit": ("WINDOW = 8, 524288, 8", "WINDOW = 8, 524288, 9", "count=9"),
    "upload_on_request": ('+ message["count"]', "+ 13", "expected part"),
    "variants": ("variant=len(variants) * able", "variant=0", "ready names variant 0 of 3, exit 2"),
    "cut_in_the_download": (
        'job["have"] if is_again else job["asked"]',
        'job["asked"]',
        "(3, 3, 0)",
    ),
    "another_run": (' if welcome["run"] == self.run else None', "", "unasked: fetch"),
    "revoked": ('raise SystemExit(f"refused', 'print(f"refused', "still runs"),
}


def client(path: Path = MINIMAL) -> str:
    return f"{sys.executable} {path} {PLACES}"


@pytest.mark.slow
def test_the_minimal_device_passes(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["--client", client(), "--json", str(report)]) == 0, capsys.readouterr().out
    told = json.loads(report.read_text())["scenarios"]
    assert [each["name"] for each in told] == [each.__name__ for each in SCENARIOS]
    assert all(each["why"] == "" and each["said"] and each["what"] for each in told)
    assert f"{len(SCENARIOS)} of {len(SCENARIOS)} scenarios passed" in capsys.readouterr().out


@pytest.mark.slow
def test_our_own_device_passes(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    flags = "run --coordinator {endpoint} --id {name} --keys {keys} --data {data} --threads 1"
    board = "--board raspberry-pi-4 --host-gflops 30"
    command = f"{sys.executable} -m edge_sdk.cli {flags} {board}"
    assert main(["--client", command]) == 0, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("scenario", MUTANTS)
def test_a_device_that_breaks_a_rule_is_told(scenario, tmp_path, capsys):
    right, wrong, said = MUTANTS[scenario]
    text = MINIMAL.read_text()
    assert text.count(right) == 1
    mutant = tmp_path / "mutant.py"
    mutant.write_text(text.replace(right, wrong))
    assert main(["--client", client(mutant), "--only", scenario, "--patience", "8"]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^FAILED  {scenario}  ", printed, re.M)
    assert said in printed


def test_a_program_that_ends_is_not_waited_for(capsys):
    command = f"{sys.executable} -c 'exit(7)'"
    assert main(["--client", command, "--only", "credit", "--patience", "300"]) == 1
    assert "its program has ended with status 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [("sleep {nothing}", "the places are {endpoint}"), ("no-such-program", "does not start")],
)
def test_a_command_that_cannot_be_run_is_one_line(command, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--client", command])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
