"""The device's resident process stays small: which rooms load neither torch nor numpy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, World, mapped_libraries, wait_until

HEAVY = ("torch", "numpy", "ray", "sklearn", "scipy", "rich", "safetensors", "coordinator", "tools")
LIGHT_ROOMS = ("agent", "cli", "hardware", "helpers", "protocol")
LIGHT_FILES = (
    "capacity/costs",
    "capacity/choice",
    "capacity/chooser",
    "infer/model_folder",
    "training/__main__",
    "client",
    "errors",
    "version",
    "__init__",
)
HEAVY_FILES = ("protocol/tensors",)


def light_modules() -> list[str]:
    files = [file for room in LIGHT_ROOMS for file in (ROOT / "edge_sdk" / room).glob("*.py")]
    files += [ROOT / "edge_sdk" / f"{name}.py" for name in LIGHT_FILES]
    files = [file for file in files if file not in heavy_files()]
    return sorted(module_of(file) for file in files)


def heavy_files() -> list[Path]:
    return [ROOT / "edge_sdk" / f"{name}.py" for name in HEAVY_FILES]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_light_rooms_import_nothing_heavy():
    """Each module in an interpreter of its own state: forked, so that none has loaded it before."""
    code = (
        "import importlib, os, sys\n"
        f"for name in {light_modules()!r}:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        importlib.import_module(name)\n"
        f"        heavy = sorted({set(HEAVY)!r} & set(sys.modules))\n"
        "        print(name, 'loads', heavy, flush=True) if heavy else None\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, name\n"
    )
    assert printed(code) == []


@pytest.mark.parametrize("file", HEAVY_FILES)
def test_exceptions_of_the_rule_still_need_to_be(file):
    code = (
        f"import sys, {module_of(ROOT / 'edge_sdk' / f'{file}.py')}; print('torch' in sys.modules)"
    )
    assert printed(code) == ["True"]


def printed(code: str) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return ended.stdout.splitlines()


def test_the_package_itself_imports_not_even_zmq_and_its_client_no_numpy():
    code = (
        "import sys, edge_sdk; assert not {'zmq', 'msgspec'} & set(sys.modules); "
        f"from edge_sdk import Client, Event; assert not {set(HEAVY)!r} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["infer.early_exit", "infer.thresholds", "infer.report", "data"])
def test_inference_imports_no_torch(name):
    """It needs numpy and, once a model is loaded, onnxruntime; test_early_exit.py runs it."""
    code = f"import sys, edge_sdk.{name}; print(*{set(HEAVY) - {'numpy'}!r} & set(sys.modules))"
    assert printed(code) == [""]


def test_commands_of_one_answer_import_nothing_heavy_in_the_coordinator(tmp_path):
    """Nor do the names of what runs rounds. (Their --help shows a method's own defaults, for which
    the method is imported.)"""
    key = "a" * 40
    asked = [
        (["keys"], 0),
        (["clients", "add", "a", key], 0),
        (["clients", "list"], 0),
        (["clients", "pending"], 0),
        (["clients", "remove", "a"], 0),
        (["invite", "--endpoint", "tcp://host:5555"], 0),
        (["status", "--run-dir", "."], 1),
        (["history", "."], 1),
        (["emulate", "--method", "no"], 2),
        (["export", "--help"], 0),
    ]
    code = (
        "import sys\nfrom coordinator.cli.main import main\nfound = []\n"
        f"for argv in {[argv for argv, _ in asked]!r}:\n"
        "    try:\n        found.append(main(argv))\n"
        "    except SystemExit as stop:\n        found.append(stop.code)\n"
        f"print(found, sorted({set(HEAVY) - {'coordinator'}!r} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ended.stdout.splitlines()[-1] == f"{[status for _, status in asked]} []", ended.stderr


def test_a_waiting_agent_has_not_mapped_torch(tmp_path):
    """Its trainer has, so the file would show it. test_end_to_end.py looks again after rounds."""
    with World(tmp_path, num_devices=1) as world:
        agent = world.device("a")
        agent.wait_said("waiting for it")
        trainer = agent.trainer().pid
        wait_until(lambda: "libtorch" in str(mapped_libraries(trainer)), "the trainer has torch")
        libraries = mapped_libraries(agent.process.pid)
    assert any("zmq" in library for library in libraries)
    assert not [name for name in libraries if "torch" in name or "numpy" in name]
