"""The floors of both packages: a room imports only rooms that stand below it.

docs/architecture.md tells the same; an import upwards is most often a function that wants to stand
in a lower room, or a callback that its caller should pass down.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT

# Lowest floor first. Rooms of one floor do not know each other.
FLOORS = {
    "edge_sdk": (
        ("errors", "version"),
        ("helpers",),
        ("protocol",),
        ("tasks",),
        ("data", "hardware"),
        ("models",),
        ("capacity",),
        ("infer", "agent"),
        ("training",),
        ("client",),
        ("cli",),
    ),
    "coordinator": (
        ("config", "presets"),
        ("admission", "settings"),
        ("registry",),
        ("cohorts",),
        ("aggregation", "generators", "personal"),
        ("methods",),
        ("store",),
        ("links",),
        ("fleet",),
        ("runs",),
        ("cli",),
    ),
}
# Packages whose names may be imported from themselves.
FACES = ("edge_sdk", "edge_sdk.data", "edge_sdk.infer", "edge_sdk.models")
# (folder, what nothing in it imports, why)
FORBIDDEN = [
    ("edge_sdk", ("coordinator", "tools", "tests"), "a device is installed without them"),
    ("coordinator", ("tools", "tests"), "they are not installed"),
    ("coordinator", ("edge_sdk.agent", "edge_sdk.client"), "the coordinator is no device"),
    ("coordinator/methods", ("zmq", "sqlite3"), "a method knows neither links nor the store"),
    ("coordinator/generators", ("zmq", "sqlite3"), "a generator knows neither links nor the store"),
    ("tools", ("tests",), "tools run without the tests"),
]


def imported_names(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, also in a function: of `from a import b` both a and
    a.b, for b may be a module."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def floor_of(package: str) -> dict[str, int]:
    return {room: floor for floor, rooms in enumerate(FLOORS[package]) for room in rooms}


def upward_imports(package: str, root: Path) -> set[str]:
    floors = floor_of(package)
    found = set()
    for file in sorted((root / package).rglob("*.py")):
        parts = file.relative_to(root / package).with_suffix("").parts
        if parts == ("__init__",):
            continue  # the face: lazy
        room = parts[0]
        for line, name in imported_names(file):
            target = name.split(".")[1] if name.startswith(f"{package}.") else room
            if target == room or target not in floors:
                continue
            if floors[target] >= floors[room]:
                found.add(
                    f"{file.relative_to(root)}:{line} imports {package}.{target}, which does not "
                    f"stand below {room}: move what it needs to a lower room, or have the caller "
                    "pass it"
                )
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_a_floor(package):
    rooms = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py"}
    rooms |= {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(floor_of(package))


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_downwards_only(package):
    assert not upward_imports(package, ROOT)


MOST_LINES = {"edge_sdk": 400, "coordinator": 400, "tools": 450, "tests": 450}


@pytest.mark.parametrize("folder", MOST_LINES)
def test_a_file_can_be_read_at_once(folder):
    lines = {file: len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    long = [f"{file}: {n}" for file, n in lines.items() if n > MOST_LINES[folder]]
    assert not long, "the design wants a change: a file for each subject"


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_says_what_it_is_for(package):
    for file in (ROOT / package).glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} says nothing"


@pytest.mark.parametrize("package", FACES)
def test_every_name_that_a_package_offers_is_there(package):
    module = importlib.import_module(package)
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize(("folder", "barred", "why"), FORBIDDEN, ids=lambda value: str(value)[:24])
def test_what_a_folder_never_imports(folder, barred, why):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}: {why}"
        for file in files
        for line, name in imported_names(file)
        if any(name == one or name.startswith(f"{one}.") for one in barred)
    ]
    assert not wrong


def test_an_import_upwards_is_found_wherever_it_stands(tmp_path):
    room = tmp_path / "edge_sdk" / "protocol"
    room.mkdir(parents=True)
    (room / "link.py").write_text(
        "import a.b\nfrom edge_sdk.errors import EdgeError\n"
        "def f():\n    from edge_sdk import agent\n    from edge_sdk.cli.flags import g\n"
    )
    (first, second) = sorted(upward_imports("edge_sdk", tmp_path))
    assert first.startswith("edge_sdk/protocol/link.py:4 imports edge_sdk.agent, which does not ")
    assert second.startswith("edge_sdk/protocol/link.py:5 imports edge_sdk.cli, which does not ")
