"""A device without torch, with a broken one or one that is too old: one line, and what can go on
does. Each command is a process of its own in which `import torch` really fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.data.loading import save_shard
from edge_sdk.errors import LackError
from edge_sdk.helpers import imports
from tests.support.examples import examples
from tests.support.processes import ROOT

MISSING = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Missing())
"""
BROKEN = "raise OSError('libcudnn.so.8: cannot open shared object file')"
STATES = {
    "missing": ("sitecustomize.py", MISSING, "which is not installed; "),
    "broken": ("torch/__init__.py", BROKEN, "which does not load: libcudnn.so.8: cannot open "),
    "old": ("torch/__init__.py", "__version__ = '1.13.1'", "2.1 or later, this is 1.13.1; "),
}
COMMANDS = {
    "edge-sdk plan": ["plan", "--model", "cnn", "--input", "1x8x8", "--classes", "10"],
    "edge-sdk export": ["export", "model.safetensors", "--out", "model"],
    "training": [
        "run",
        "--coordinator",
        "tcp://127.0.0.1:9",
        "--data",
        "shard.npz",
        "--insecure",
        "--id",
        "a",
    ],
}


def run(
    folder: Path, state: str, *arguments: str, module: str = "edge_sdk.cli"
) -> subprocess.CompletedProcess[str]:
    """A command with a torch in that state; its current folder is `folder`."""
    file, text, _ = STATES[state]
    path = folder / "path" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": f"{folder / 'path'}{os.pathsep}{ROOT}"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("what", COMMANDS)
@pytest.mark.parametrize("state", STATES)
def test_what_needs_torch_is_one_line_with_the_next_step(tmp_path, what, state):
    save_shard(tmp_path / "shard.npz", examples())
    done = run(tmp_path, state, *COMMANDS[what])
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"edge-sdk: {what} needs torch")
    assert STATES[state][2] in last
    assert '-py3-none-any.whl[torch]", or on a Jetson' in last
    assert "Traceback" not in done.stderr
    if what != "training":  # whose log comes before
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("state", STATES)
def test_measure_tells_the_rest(tmp_path, state):
    done = run(tmp_path, state, "measure", "--memory-cap", "64M")
    assert done.returncode == 0
    assert "memory   64.0 MiB for training (bound: cap)" in done.stdout
    assert "compute  not measured, " in done.stdout
    assert done.stderr.startswith("edge-sdk: compute was not measured: measuring compute needs ")
    assert done.stderr.count("\n") == 1
    found = json.loads(run(tmp_path, state, "measure", "--json").stdout)
    assert (found["gflops"], found["layer_s"]) == (0, 0)
    assert found["memory_total_bytes"] > 0
    assert found["cores"] > 0


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ("missing", "No module named 'torch'"),
        ("broken", "OSError: libcudnn.so.8: cannot open shared object file"),
    ],
)
def test_the_doctor_says_it_too(tmp_path, state, found):
    lines = run(tmp_path, state, "doctor").stdout.splitlines()
    (at,) = (n for n, line in enumerate(lines) if line.startswith("fail  torch"))
    assert found in lines[at]
    assert lines[at + 1].strip() == f"{imports.INSTALL}; edge-sdk infer works without"


def test_the_coordinators_command_without_its_extra(tmp_path):
    done = run(tmp_path, "missing", "emulate", module="coordinator.cli")
    assert done.returncode == 1
    said = f"edge-coordinator: No module named 'torch'; {imports.install('coordinator')}\n"
    assert done.stderr == said


@pytest.mark.parametrize(
    ("version", "is_too_old"),
    [
        ("2.1.0", False),
        ("2.13.0+cpu", False),
        ("10.0", False),
        ("2.1.0a0+41361538.nv23.06", False),
        ("2.0.1", True),
        ("1.13.1", True),
        ("unknown", True),
    ],
)
def test_versions(version, is_too_old):
    assert imports.is_too_old(version) is is_too_old


def test_the_oldest_is_the_one_that_pip_takes():
    lines = [
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if "'torch" in line
    ]
    oldest = ".".join(map(str, imports.OLDEST))
    assert len(lines) == 2
    assert all(f"'torch>={oldest}" in line for line in lines)


def test_a_package_for_another_torch_is_not_to_be_installed_again_by_its_extra(
    tmp_path, monkeypatch
):
    (tmp_path / "of_another.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LackError, match="exist; it, or what it needs, is for another torch; rein"):
        imports.optional_module("of_another", "this", "torchvision")
