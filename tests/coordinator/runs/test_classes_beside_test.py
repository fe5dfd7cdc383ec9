"""serve: a test set that happens to lack a class, and --classes that says so."""

from __future__ import annotations

import numpy as np

from coordinator.cli.main import main
from coordinator.store.store import Store
from tests.support.processes import World


def test_a_test_set_without_the_last_class(tmp_path, capsys):
    with World(tmp_path, num_devices=1) as world:
        lacking = world.test.take(np.flatnonzero(world.test.y < 9))
        test = tmp_path / "no-nine.npz"
        np.savez(test, x=lacking.x, y=lacking.y)
        flags = ["--test", str(test), "--rounds", "1"]
        assert main(world.serve_flags(*flags, "--classes", "8")) == 2
        assert f"--classes 8, but {test} has 9" in capsys.readouterr().err
        assert main(world.serve_flags(*flags, "--input", "1x9x9")) == 2
        assert f"--input 1x9x9, but {test} has 1x8x8" in capsys.readouterr().err
        assert not world.run_dir.exists(), "nothing was begun"
        assert 9 in world.shards["a"].y
        coordinator = world.serve(*flags, "--classes", "10", "--input", "1x8x8")
        assert world.device("a", "--once").end() == 0
        assert coordinator.end() == 0
        store = Store.open_readonly(world.run_dir)
        assert store.config.model.num_classes == 10
        store.close()
