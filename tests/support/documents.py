"""What a document of this repository holds, and checks of it that return what is wrong."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeAlias

from coordinator.cli.main import main as coordinate
from edge_sdk.cli.main import main as device
from tests.support.processes import ROOT

BASES = (ROOT, ROOT / "edge_sdk", ROOT / "coordinator")  # documents name files from these
ENDINGS = (".py", ".md", ".csv", ".toml", ".sh", ".svg", ".yaml")
Command: TypeAlias = Callable[[list[str]], int]
COMMANDS: dict[str, Command] = {"edge-sdk": device, "edge-coordinator": coordinate}
SERVICE = ("service install", "service remove", "service status", "service logs")
INFERENCE = ("export", "infer", "calibrate", "infer-report")
SUBCOMMANDS = {
    "edge-sdk": ("measure", "plan", "run", "join", "keys", "doctor", *SERVICE, *INFERENCE),
    "edge-coordinator": (
        "emulate",
        "serve",
        "methods",
        "keys",
        "clients",
        "invite",
        "export",
        "status",
        "history",
    ),
}


# -- what a document holds ------------------------------------------------------------------------


def blocks(text: str) -> Iterator[str]:
    """Fenced and indented blocks."""
    for found in re.finditer(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        yield found[1]
    for found in re.finditer(r"(?<=\n\n)(?: {4}.*\S.*\n)+", without_fences(text) + "\n"):
        yield textwrap.dedent(found[0])


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The words of each line in a block that calls one of ours, by whatever path."""
    lines = [line.removeprefix("sudo ") for block in blocks(text) for line in block.splitlines()]
    called = [line for line in lines if Path((line.split() or [""])[0]).name in COMMANDS]
    words = [shlex.split(line, comments=True) for line in called]
    return [[Path(first).name, *rest] for first, *rest in words]


def spans(text: str) -> list[str]:
    """What stands in backticks outside of blocks; a line break counts as a space."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", without_fences(text))]


def headings(text: str) -> set[str]:
    """As GitHub names them in links."""
    found = re.findall(r"^#+ (.*)$", without_fences(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def first_cells(text: str, heading: str) -> list[str]:
    """The name in backticks that begins each row of the first table below a heading."""
    below = re.search(rf"^#* ?{re.escape(heading)}.*?(^\|.*?)^$", text, re.M | re.S)
    assert below, f"no table below {heading!r}"
    return re.findall(r"^\| `([^`]+)`", below[1], re.M)


# -- checks: each returns what is wrong -----------------------------------------------------------


def bad_links(path: Path, text: str) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if target.startswith("https:"):
            continue
        if not file.exists() or (anchor and anchor not in headings(file.read_text())):
            wrong.append(target)
    return wrong


def missing_files(text: str) -> list[str]:
    """Names of files and, where they begin with one of our folders, of folders."""
    wrong = []
    for name in re.split(r"[\s\"']+", "\n".join(spans(text))):
        is_path = re.fullmatch(r"[\w./*-]*[\w*]/?", name) and "/" in name
        if not is_path or name.startswith(("/", "./")):
            continue
        is_ours = any((base / name.split("/")[0]).is_dir() for base in BASES)
        is_named = name.endswith((*ENDINGS, "/")) or name.split("/")[0] in ("tests", "tools")
        is_there = any(list(base.glob(name.rstrip("/"))) for base in BASES)
        if (is_ours or name.endswith(".py")) and is_named and not is_there:
            wrong.append(name)
    return wrong


def missing_modules(text: str) -> list[str]:
    """Of `python -m MODULE`."""
    named = re.findall(r"python -m ((?:tools|tests|edge_sdk|coordinator)[\w.]*)", text)
    wrong = []
    for name in named:
        package = ROOT.joinpath(*name.split("."))
        if not package.with_suffix(".py").is_file() and not (package / "__main__.py").is_file():
            wrong.append(name)
    return wrong


def unknown_flags(text: str, known: Collection[str]) -> list[str]:
    code = [*spans(text), *blocks(text)]
    used = {flag for part in code for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", part)}
    return sorted(used - set(known))


def unknown_subcommands(text: str) -> list[str]:
    """Of our commands in running text, e.g. `edge-sdk service status` or `edge-sdk run|infer`."""
    wrong = []
    for code in spans(text):
        command, *words = code.split()
        words = [word for word in words if not word.startswith("-")][:2]
        for first in words[0].split("|") if command in COMMANDS and words else ():
            known = [name for name in SUBCOMMANDS[command] if name.split()[0] == first]
            takes_another = all(" " in name for name in known) and len(words) > 1
            if not known or (takes_another and " ".join([first, words[1]]) not in known):
                wrong.append(code)
    return wrong


def unknown_targets(text: str) -> list[str]:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    code = "\n".join([*spans(text), *blocks(text)])
    return [name for name in re.findall(r"^make ([a-z-]+)", code, re.M) if name not in targets]


def foreign_installs(text: str) -> list[str]:
    """`pip install edge-sdk` takes another project's package."""
    return re.findall(r"pip install (?:[^\n`]*[\"' ])?edge[-_]sdk(?:\[|[\"'\s])", text + "\n")
