"""What a run freezes travels to a real device once: not in its next round, not after a restart of
its program, not in the next run of its coordinator."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from safetensors.torch import load_file

from coordinator.config import read_config
from edge_sdk.models import build
from edge_sdk.protocol.stream import PART_BYTES, layout
from edge_sdk.protocol.tensor_lists import is_frozen
from edge_sdk.protocol.tensors import specs_of
from edge_sdk.training.saved_update import KEPT
from tests.support.processes import World

FLAGS = ["--method", "fedavg-l", "--freeze", "backbone", "--model", "mlp"]
FLAGS += ["--option", "widths=512,512,512", "--rounds", "2"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    with World(tmp_path, num_devices=1) as world:
        yield world


def bytes_of_a_run(world, folder: str, *flags: str) -> dict[int, tuple[int, int]]:
    """Down and up by round, of a device that is started for it."""
    world.run_dir = world.folder / folder
    server, device = world.serve(*FLAGS, *flags), world.device("a", "--once")
    assert (server.end(), device.end()) == (0, 0), server.text() + device.text()
    rows = world.rows("SELECT round, bytes_down, bytes_up FROM participations")
    return {round: (down, up) for round, down, up in rows}


def test_a_frozen_backbone_travels_once(world):
    first, second = bytes_of_a_run(world, "first"), bytes_of_a_run(world, "second")
    (text,) = world.rows("SELECT config FROM runs")[0]
    held = build(read_config(text, "run").model).tensors()
    frozen = {name: tensor for name, tensor in held.items() if is_frozen(name, ("stages",))}
    trained = {name: tensor for name, tensor in held.items() if name not in frozen}
    backbone = layout(specs_of(frozen)).total_bytes
    exits = layout(specs_of(trained)).total_bytes
    assert backbone > 4 * PART_BYTES > 30 * exits
    assert first == {1: (exits + backbone, exits), 2: (exits, exits)}
    assert second == {1: (exits, exits), 2: (exits, exits)}
    (folder,) = (world.folder / "cache").rglob(KEPT)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= backbone
    models = [load_file(world.folder / run / "model.safetensors") for run in ("first", "second")]
    for name in frozen:
        assert models[0][name].numpy().tobytes() == models[1][name].numpy().tobytes()


def test_adapters_travel_without_their_backbone(world):
    """Of 0.56 M weights the device sends those of adapters and exits; bases are kept, too."""
    found = bytes_of_a_run(world, "adapted", "--adapt", "pq-lora", "--adapt-rank", "4")
    (text,) = world.rows("SELECT config FROM runs")[0]
    spec = read_config(text, "run").model
    held = build(spec).tensors()
    trained = {n: t for n, t in held.items() if not is_frozen(n, ("stages",))}
    small, whole = layout(specs_of(trained)).total_bytes, layout(specs_of(held)).total_bytes
    assert found[2] == (small, small)
    assert found[1][1] == small
    assert found[1][0] == pytest.approx(whole, abs=2000)  # two messages of parts instead of one
    every_weight = build(replace(spec, adapters=None)).tensors()
    assert small < 0.03 * layout(specs_of(every_weight)).total_bytes
    served = load_file(world.run_dir / "model.safetensors")
    assert any(served[name].any() for name in served if name.endswith("adapter.p"))
