"""The device's resident process stays small: no torch in the agent, and who may import whom."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT, World, mapped_libraries

LIGHT = ("", ".wire", ".errors", ".profile", ".capacity", ".keys", ".cli", ".cli_run", ".cli_infer",
         ".exported", ".agent", ".supervisor", ".doctor", ".service", ".config_file", ".notify",
         ".device", ".events", ".logs", ".client", ".torch_extra", ".worker_main", ".boards",
         ".conditions", ".jetson", ".pressure", ".sysfs", ".join", ".cli_join",
         ".invitation", ".helpers.files")  # fmt: skip
HEAVY = ("torch", "numpy", "ray", "sklearn", "scipy", "rich", "safetensors", "coordinator", "tools")


@pytest.mark.parametrize("module", [f"edge_sdk{name}" for name in LIGHT])
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ended.stdout.split() == []


def test_the_package_itself_imports_not_even_zmq_and_its_client_no_numpy():
    code = (
        "import sys, edge_sdk; assert not {'zmq', 'msgspec'} & set(sys.modules); "
        f"from edge_sdk import Client, Event; assert not {set(HEAVY)!r} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["infer", "calibrate", "infer_report", "data"])
def test_inference_imports_no_torch(name):
    """It needs numpy and, once a model is loaded, onnxruntime; test_infer.py runs it to the end."""
    code = f"import sys, edge_sdk.{name}; print(*{set(HEAVY) - {'numpy'}!r} & set(sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ended.stdout.split() == []


def test_commands_of_one_answer_import_nothing_heavy_in_the_coordinator(tmp_path):
    """Nor do the flags of those that run rounds: --help and wrong usage come at once."""
    key = "a" * 40
    asked = [
        (["keys"], 0), (["clients", "add", "a", key], 0), (["clients", "list"], 0),
        (["clients", "pending"], 0), (["clients", "remove", "a"], 0),
        (["invite", "--endpoint", "tcp://host:5555"], 0), (["status", "--run-dir", "."], 1),
        (["serve", "--help"], 0), (["emulate", "--method", "no"], 2), (["export", "--help"], 0),
    ]  # fmt: skip
    code = (
        "import sys\nfrom coordinator.cli.main import main\nfound = []\n"
        f"for argv in {[argv for argv, _ in asked]!r}:\n"
        "    try:\n        found.append(main(argv))\n"
        "    except SystemExit as stop:\n        found.append(stop.code)\n"
        f"print(found, sorted({set(HEAVY) - {'coordinator'}!r} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.stdout.splitlines()[-1] == f"{[status for _, status in asked]} []", ended.stderr


def test_a_waiting_agent_has_not_mapped_torch(tmp_path):
    """Its trainer has, so the file would show it. test_end_to_end.py looks again after rounds."""
    with World(tmp_path, num_devices=1) as world:
        agent = world.device("a")
        agent.wait_said("waiting for it")
        libraries = mapped_libraries(agent.process.pid)
        trainer_libraries = mapped_libraries(agent.trainer().pid)
    assert any("zmq" in library for library in libraries)
    assert not [name for name in libraries if "torch" in name or "numpy" in name]
    assert any("libtorch" in library for library in trainer_libraries)


# -- who may import whom ----------------------------------------------------------------------

# (folder, what its files never import): scanned wherever the import stands, also in a function.
FORBIDDEN = [
    ("edge_sdk", ("coordinator", "tools", "tests", "ray")),
    ("coordinator", ("tools", "tests", "ray", "edge_sdk.agent.agent", "edge_sdk.training.worker",
                     "edge_sdk.training")),
    ("coordinator/methods", ("coordinator.runs.rounds", "coordinator.store.store", "coordinator.fleet.cohort",
                             "coordinator.fleet.router", "coordinator.fleet.open_job", "zmq", "sqlite3")),
    ("coordinator/generators", ("coordinator.runs.rounds", "coordinator.store.store",
                                "coordinator.fleet.cohort", "coordinator.methods.depthwise")),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "forbidden"), FORBIDDEN, ids=lambda value: str(value)[:24])
def test_layers_import_downwards_only(folder, forbidden):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imported_names(file)
        if any(name == barred or name.startswith(f"{barred}.") for barred in forbidden)
    ]
    assert not wrong


def imported_names(file: Path) -> Iterator[str]:
    """Dotted names: of `from a import b` both a and a.b, for b may be a module."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_scan_finds_imports_anywhere(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import a.b\ndef f():\n    from c import d\n    from coordinator import store\n"
    )
    assert set(imported_names(file)) == {
        "a.b",
        "c",
        "c.d",
        "coordinator",
        "coordinator.store.store",
    }
