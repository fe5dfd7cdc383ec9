"""The documents are true: commands run or are parsed, links, names of files and flags exist, tables
hold what the code has. Each check returns complaints, and is shown to complain where it should."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from coordinator.aggregation.registry import RULES
from coordinator.generators.registry import GENERATORS
from coordinator.methods.registry import METHODS
from coordinator.presets import PRESETS
from coordinator.settings import flags_of
from edge_sdk.data import load_shard, save_shard
from edge_sdk.models import FAMILIES, build
from edge_sdk.protocol.keys import make_keys
from tests.support.documents import (
    COMMANDS,
    SUBCOMMANDS,
    bad_links,
    blocks,
    commands,
    first_cells,
    foreign_installs,
    headings,
    missing_files,
    missing_modules,
    spans,
    unknown_flags,
    unknown_subcommands,
    unknown_targets,
    without_fences,
)
from tests.support.examples import cnn, examples
from tests.support.processes import ROOT
from tests.test_rooms import FLOORS
from tools.testbed.__main__ import make_parser

README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NO_FLAG = "--no-such-flag"
FOREIGN_FLAGS = {"--system-site-packages", "--no-deps", "--wheel-dir", "--index-url"}  # venv, pip

# README.md's own commands: run by test_readme_commands_run in this order, or only parsed, and why.
RUN = (
    "edge-coordinator keys",
    "edge-coordinator invite --name pi-1",
    "edge-coordinator history runs/first --plot run.svg",
    "edge-coordinator export --run runs/first --out model",
    "edge-sdk calibrate model --data held-out.npz --accuracy-loss 0.01",
    "edge-sdk infer model --data my-inputs.npy --out predictions.csv",
)
PARSED = {
    "edge-sdk plan --model cnn --data my-data.npz": "takes half a minute; has tests of its own",
    "edge-sdk join LINE": "needs a coordinator that serves; run by examples/two_devices.sh",
    "edge-sdk run --config ~/.config/edge-sdk/config.toml --data my-data.npz": "the same",
    "edge-coordinator serve --run-dir runs/first --test my-test.npz --min-clients 2 --rounds 50": (
        "waits for two devices; run so by examples/two_devices.sh"
    ),
    "edge-coordinator status --run-dir runs/first": "tells of a run that was served; the same",
}
FOREIGN = {
    "make": "takes minutes; targets and flags are checked by test_make_commands_are_real",
    "python3 -m venv": "makes an environment",
    "pip install": "fetches torch",
}
OUTPUT = ("emulated boards (", " per exit", "memory saved", "deadline of a job")


def said(capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> str:
    """What argparse prints when it ends a command."""
    with pytest.raises(SystemExit):
        COMMANDS[command]([*arguments])
    printed = capsys.readouterr()
    return printed.out + printed.err


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """What the real parser says against a command; "" if all it minds is a flag put at its end."""
    answer = said(capsys, *words, NO_FLAG)
    return "" if f"unrecognized arguments: {NO_FLAG}" in answer else answer


@pytest.fixture
def known_flags(capsys):
    """Of both commands' --help, of methods' own options, and as literals of the tools' parsers."""
    helps = [said(capsys, command, "--help") for command in COMMANDS]
    for command, names in SUBCOMMANDS.items():
        helps += [said(capsys, command, *name.split(), "--help") for name in names]
    sources = [*ROOT.glob("tools/**/*.py"), *ROOT.glob("tests/chaos/*.py")]
    literals = [re.findall(r'"(--[a-z-]+)"', path.read_text()) for path in sources]
    found = re.findall(r"(?<![\w-])--[a-z][a-z-]*", "\n".join(helps))
    kinds = [METHODS[name].options for name in METHODS]
    own = [flag.name for kind in kinds if kind for flag in flags_of(kind).values()]
    return FOREIGN_FLAGS.union(found, own, *literals)


# -- every document -------------------------------------------------------------------------------

each = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@each
def test_links_files_modules_and_targets_exist(path):
    text = path.read_text()
    assert bad_links(path, text) == []
    assert missing_files(text) == []
    assert missing_modules(text) == []
    assert unknown_targets(text) == []
    assert unknown_subcommands(text) == []
    assert foreign_installs(text) == []


def test_flags_exist(known_flags):
    wrong = {str(path): unknown_flags(path.read_text(), known_flags) for path in DOCUMENTS}
    assert {name: flags for name, flags in wrong.items() if flags} == {}


@each
def test_commands_are_parsed_by_the_real_parser(path, capsys):
    answers = {shlex.join(words): refused(capsys, words) for words in commands(path.read_text())}
    assert {words: answer for words, answer in answers.items() if answer} == {}


def test_every_page_and_table_of_results_is_linked():
    linked = set()
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
            linked.add((path.parent / target).resolve())
    assert {*ROOT.glob("docs/**/*.*"), *ROOT.glob("*.md")} - linked == {README}


# -- README.md ------------------------------------------------------------------------------------


def test_the_readme_is_short():
    text = README.read_text()
    assert text.count("\n") <= 150
    assert len(text.split()) <= 1600


def test_every_readme_command_is_run_parsed_or_excepted():
    text = README.read_text()
    ours = [shlex.join(words) for words in commands(text)]
    assert sorted(ours) == sorted(shlex.join(shlex.split(line)) for line in (*RUN, *PARSED))
    shell = "".join(block for block in blocks(without_fences(text)) if OUTPUT[0] not in block)
    others = [line for line in shell.splitlines() if line.split()[0] not in COMMANDS]
    assert [line for line in others if not line.startswith(tuple(FOREIGN))] == []
    assert all(any(line.startswith(begin) for line in others) for begin in FOREIGN)


def test_readme_commands_run(tmp_path, monkeypatch, capsys):
    """In a folder with a run of four emulated clients, and data of the same form."""
    monkeypatch.chdir(tmp_path)
    flags = "--data digits --examples 60 --test-examples 20 --split iid --clients 4 --groups 2,1,1"
    small = "--rounds 1 --epochs 1 --option channels=4,4,4 --run-dir runs/first"
    assert COMMANDS["edge-coordinator"](["emulate", *flags.split(), *small.split()]) == 0
    data = load_shard("digits").take(np.arange(40))
    save_shard("held-out.npz", data)
    np.save("my-inputs.npy", data.x)
    for line in RUN:
        command, *arguments = shlex.split(line)
        assert COMMANDS[command](arguments) == 0, line
    assert (tmp_path / "keys" / "server.secret").exists()
    assert "edge-join-1-" in capsys.readouterr().out
    assert (tmp_path / "predictions.csv").read_text().count("\n") == 41  # and a header


def test_make_commands_are_real():
    """Their targets by unknown_targets; here the flags that they pass on to the testbed."""
    found = re.findall(r'make testbed ARGS="([^"]*)"', README.read_text())
    assert found
    for flags in found:
        make_parser().parse_args(shlex.split(flags))
    sources = "".join(path.read_text() for path in ROOT.glob("tools/testbed/*.py"))
    shown = next(block for block in blocks(README.read_text()) if OUTPUT[0] in block)
    assert 8 <= shown.count("\n") <= 12
    assert [words for words in OUTPUT if words not in shown or words not in sources] == []


def test_the_data_contract_holds(tmp_path, monkeypatch):
    """uint8 is scaled by x / 127.5 - 1, floats and num_classes stay."""
    monkeypatch.chdir(tmp_path)
    line = next(code for code in spans(README.read_text()) if code.startswith("np.savez("))
    y = np.array([0, 1, 2, 1])
    exec(line, {"np": np, "x": np.full((4, 1, 2, 3), 255, np.uint8), "y": y})
    shard = load_shard("my-data.npz")
    assert (shard.input_shape, shard.num_classes, shard.scaling) == ((1, 2, 3), 10, (127.5, 1.0))
    np.testing.assert_array_equal(shard.x, np.ones((4, 1, 2, 3), np.float32))
    exec(line, {"np": np, "x": np.full((4, 2, 3), 7.5), "y": y})
    series = load_shard("my-data.npz")
    assert (series.input_shape, series.scaling) == ((2, 3), None)
    np.testing.assert_array_equal(series.x, np.full((4, 2, 3), 7.5, np.float32))


def python_block(words: str) -> str:
    (found,) = [code for code in blocks(README.read_text()) if words in code]
    assert found.count("\n") <= 13
    return found


def test_the_client_in_the_readme_is_made(tmp_path, monkeypatch):
    """And ends at once, as it was stopped before; tests of Client run one to the end."""
    monkeypatch.chdir(tmp_path)
    for name in ("device", "server"):
        make_keys(Path("keys"), name)
    np.save("x.npy", examples(6).x)
    np.save("y.npy", examples(6).y)
    made, _, run = python_block("Client(").rstrip().rpartition("\n")
    assert run.startswith("client.run()")
    names: dict[str, object] = {}
    exec(made, names)
    exec("client.stop()\nclient.run()", names)


def test_the_family_in_the_readme_builds(own_things):
    before = set(FAMILIES)
    exec(python_block("register_family("), {"__name__": "readme"})
    spec = cnn(2)
    (built,) = [build(replace(spec, family=name)) for name in set(FAMILIES) - before]
    logits = built(torch.from_numpy(examples(5).x))
    assert [tuple(each.shape) for each in logits] == [(5, 3), (5, 3)]


# -- tables that hold what the code has -----------------------------------------------------------


def packages(name: str) -> set[str]:
    return {f"{path.parent.name}/" for path in (ROOT / name).glob("*/__init__.py")}


@pytest.mark.parametrize(
    ("file", "heading", "known"),
    [
        ("docs/methods.md", "Methods", {*METHODS, "hypemefed --paper"}),
        ("docs/methods.md", "Models", set(FAMILIES)),
        ("docs/methods.md", "**Generation", set(GENERATORS) - {"none"}),
        ("docs/security.md", "Harmful updates", set(RULES)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_has_a_row_for_each(file, heading, known):
    assert sorted(first_cells((ROOT / file).read_text(), heading)) == sorted(known)


def test_the_readme_compares_methods_that_there_are():
    shown = first_cells(README.read_text(), "Methods")
    assert {"hypemefed", "hypemefed --paper"} < set(shown) <= {*METHODS, "hypemefed --paper"}
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize("package", FLOORS)
def test_the_architecture_tells_the_floors_that_a_test_holds(package):
    text = (ROOT / "docs" / "architecture.md").read_text()
    (shown,) = [block for block in blocks(text) if block.startswith(f"{package} ")]
    floors = [line.strip().split(", ") for line in shown.removeprefix(package).splitlines()]
    assert [sorted(rooms) for rooms in reversed(floors)] == [*map(sorted, FLOORS[package])]


def test_tables_name_every_room_extra_and_preset():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = {name for name in re.findall(r"^\| `([^`]+)`", text, re.M) if name.count("/") == 1}
    rooms = rows - {"edge_sdk/", "coordinator/"}
    assert rooms == packages("edge_sdk") | packages("coordinator")
    declared = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^([a-z]+) = \[", declared.split("\n[")[0], re.M)) - {"dev"}
    assert set(first_cells((ROOT / "docs" / "devices.md").read_text(), "Install")) == extras
    emulation = (ROOT / "docs" / "coordinator.md").read_text()
    assert f"--preset {'|'.join(PRESETS)}" in spans(emulation)


# -- each check can fail --------------------------------------------------------------------------

BAD = """
## A heading

See [one](nowhere.md), [two](README.md#no-such-heading) and `edge_sdk/agent/nobody.py` or
`pytest nowhere/x.py`, `python -m tools.nothing`, `make nothing` and `--nothing`;
`edge-sdk runn|plan x`, `edge-sdk service begin`, `edge-sdk service`.

    edge-sdk measure --nothing      # a comment
    sudo /opt/bin/edge-sdk join
    pip install "edge-sdk[torch]"
"""


def test_checks_find_what_is_wrong(capsys):
    assert bad_links(README, BAD) == ["nowhere.md", "README.md#no-such-heading"]
    assert missing_files(BAD) == ["edge_sdk/agent/nobody.py", "nowhere/x.py"]
    assert missing_modules(BAD) == ["tools.nothing"]
    assert unknown_targets(BAD) == ["nothing"]
    assert unknown_subcommands(BAD) == ["edge-sdk runn|plan x", "edge-sdk service begin"]
    assert unknown_flags(BAD, {"--something"}) == ["--nothing"]
    assert foreign_installs(BAD) == ['pip install "edge-sdk[']
    assert foreign_installs("pip install edge-sdk") == ["pip install edge-sdk\n"]
    assert foreign_installs('pip install "./edge_sdk-0.1.0-py3-none-any.whl[torch]"') == []
    assert commands(BAD) == [["edge-sdk", "measure", "--nothing"], ["edge-sdk", "join"]]
    unknown, lacking = (refused(capsys, words) for words in commands(BAD))
    assert "--nothing --no-such-flag" in unknown
    assert "required: LINE" in lacking
    assert refused(capsys, ["edge-sdk", "measure"]) == ""
    assert headings(BAD) == {"a-heading"}
