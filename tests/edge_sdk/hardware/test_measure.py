"""Memory and cores from made-up /proc and /sys trees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edge_sdk.errors import ConfigError
from edge_sdk.hardware import limits, measure, speed
from tests.support.examples import lay_out

MiB = 1024**2
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def test_no_cgroups_means_no_limit(tmp_path):
    assert limits.cgroup_bytes_left(tmp_path) is None


def test_v2_takes_the_tighter_parent_and_counts_file_cache_as_free(tmp_path):
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/edge.service",
            f"{V2}/system.slice/edge.service/memory.max": 900 * MiB,
            f"{V2}/system.slice/edge.service/memory.high": "max",
            f"{V2}/system.slice/edge.service/memory.current": 100 * MiB,
            f"{V2}/system.slice/memory.max": 500 * MiB,
            f"{V2}/system.slice/memory.high": "max",
            f"{V2}/system.slice/memory.current": 260 * MiB,
            f"{V2}/system.slice/memory.stat": (
                f"anon 5\ninactive_file {50 * MiB}\nactive_file {10 * MiB}"
            ),
        },
    )
    # child: 900 - 100 = 800; parent: 500 - (260 - 60) = 300
    assert limits.cgroup_bytes_left(tmp_path) == 300 * MiB


def test_v2_memory_high_bounds_below_memory_max(tmp_path):
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a",
            f"{V2}/a/memory.max": 500 * MiB,
            f"{V2}/a/memory.high": 400 * MiB,
            f"{V2}/a/memory.current": 50 * MiB,
        },
    )
    assert limits.cgroup_bytes_left(tmp_path) == 350 * MiB


def test_v2_without_any_limit(tmp_path):
    lay_out(tmp_path, {"proc/self/cgroup": "0::/a", f"{V2}/a/memory.max": "max"})
    assert limits.cgroup_bytes_left(tmp_path) is None


@pytest.mark.parametrize("path", ["/", "/docker/0f3a", "/../../user.slice"])
def test_in_a_container_the_mount_root_carries_the_limit(tmp_path, path):
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": f"0::{path}",
            f"{V2}/memory.max": 300 * MiB,
            f"{V2}/memory.current": 100 * MiB,
        },
    )
    assert limits.cgroup_bytes_left(tmp_path) == 200 * MiB


def test_usage_above_the_limit_leaves_nothing(tmp_path):
    lay_out(
        tmp_path,
        {"proc/self/cgroup": "0::/a", f"{V2}/a/memory.max": 10, f"{V2}/a/memory.current": 30},
    )
    assert limits.cgroup_bytes_left(tmp_path) == 0


def test_v1_limit_and_the_number_that_means_none(tmp_path):
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/pi\n2:cpu,cpuacct:/\n1:name=systemd:/init.scope",
            f"{V1}/memory.limit_in_bytes": 9223372036854771712,
            f"{V1}/memory.usage_in_bytes": 8000 * MiB,
            f"{V1}/pi/memory.limit_in_bytes": 400 * MiB,
            f"{V1}/pi/memory.usage_in_bytes": 250 * MiB,
            f"{V1}/pi/memory.stat": f"inactive_file 1\ntotal_inactive_file {30 * MiB}",
        },
    )
    assert limits.cgroup_bytes_left(tmp_path) == 180 * MiB  # 400 - (250 - 30)


def test_hybrid_reads_v1_where_v2_has_no_controllers(tmp_path):
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/pi\n0::/pi",
            f"{V1}/pi/memory.limit_in_bytes": 400 * MiB,
            f"{V1}/pi/memory.usage_in_bytes": 100 * MiB,
            f"{V2}/unified/pi/cgroup.procs": "1",
        },
    )
    assert limits.cgroup_bytes_left(tmp_path) == 300 * MiB


def test_hybrid_falls_through_to_v2_where_v1_has_no_limit(tmp_path):
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n0::/pi",
            f"{V1}/memory.limit_in_bytes": 9223372036854771712,
            f"{V2}/unified/pi/memory.max": 200 * MiB,
            f"{V2}/unified/pi/memory.current": 50 * MiB,
        },
    )
    assert limits.cgroup_bytes_left(tmp_path) == 150 * MiB


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "no colons here\n0\n::\n3:memory"},
        {"proc/self/cgroup": "0::/a\0b", f"{V2}/a/memory.max": 5},
        {"proc/self/cgroup": "0::/a", f"{V2}/a/memory.max": "plenty"},
        {"proc/self/cgroup": "0::/a", f"{V2}/a/memory.max": -1},
        {"proc/self/cgroup": "1:memory:/", f"{V1}/memory.limit_in_bytes": "-1"},
        {"proc/self/cgroup": "1:memory:/", f"{V1}/memory.limit_in_bytes": ""},
    ],
)
def test_strange_memory_groups_are_no_limit(tmp_path, files):
    assert limits.cgroup_bytes_left(lay_out(tmp_path, files)) is None


def test_strange_figures_beside_a_limit_count_as_0(tmp_path):
    group = {"memory.max": 500 * MiB, "memory.current": "busy", "memory.stat": "inactive_file much"}
    files = {f"{V2}/a/{name}": text for name, text in group.items()}
    lay_out(tmp_path, {"proc/self/cgroup": "0::/a", **files})
    assert limits.cgroup_bytes_left(tmp_path) == 500 * MiB


KIB = "MemTotal: 948304 kB\nMemFree: 100000 kB\nBuffers: 20000 kB\nCached: 300000 kB"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{KIB}\nMemAvailable:  512000 kB", (948304 * 1024, 512000 * 1024)),
        (KIB, (948304 * 1024, 420000 * 1024)),  # an old kernel: free and cache
        (f"{KIB}\nMemAvailable: lots kB", (948304 * 1024, 420000 * 1024)),
        (f"{KIB}\nMemAvailable: 1000000 kB", (948304 * 1024, 948304 * 1024)),  # not more than all
    ],
)
def test_host_memory(tmp_path, text, expected):
    lay_out(tmp_path, {"proc/meminfo": text})
    assert limits.host_memory(tmp_path) == expected
    total, available = expected
    assert limits.memory(root=tmp_path) == (total, available - 4 * MiB, "host")


def test_a_spare_is_left_of_host_and_group_but_not_of_a_cap(tmp_path):
    group = {f"{V2}/a/memory.max": 50 * MiB, f"{V2}/a/memory.current": 20 * MiB}
    files = {"proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 90 kB", "proc/self/cgroup": "0::/a"}
    assert limits.memory(root=lay_out(tmp_path / "tiny", files))[1:] == (0, "host")
    files["proc/meminfo"] = "MemTotal: 90000 kB\nMemAvailable: 90000 kB"
    root = lay_out(tmp_path / "board", files | group)
    assert limits.memory(root=root)[1:] == (26 * MiB, "cgroup")
    assert limits.memory(own_bytes=MiB, root=root)[1:] == (27 * MiB, "cgroup")
    assert limits.memory(cap_bytes=25 * MiB, root=root)[1:] == (25 * MiB, "cap")


@pytest.mark.parametrize(
    "text", ["", "garbage", "MemTotal: many kB", "MemTotal 5", "MemTotal: -5 kB"]
)
def test_host_memory_without_meminfo_is_the_c_librarys(tmp_path, text):
    lay_out(tmp_path, {"proc/meminfo": text})
    total, available = limits.host_memory(tmp_path)
    assert total == limits.host_memory()[0] or sys.platform != "linux"
    assert 0 < available <= total


@pytest.mark.parametrize(
    ("host", "cgroup", "cap", "own", "expected"),
    [
        (1000, None, None, 0, (1000, "host")),
        (1000, 600, None, 0, (600, "cgroup")),
        (1000, 600, 500, 0, (500, "cap")),
        (1000, 600, None, 250, (850, "cgroup")),  # the running trainer's 250 come back
        (1000, 600, 800, 250, (800, "cap")),  # but a cap is on the whole trainer
        (100, 600, 800, 250, (350, "host")),
    ],
)
def test_least_bound(host, cgroup, cap, own, expected):
    assert limits.least_bound(host, cgroup, cap, own) == expected


def test_cores_by_quota(tmp_path):
    v1 = lay_out(
        tmp_path / "v1",
        {
            "proc/self/cgroup": "2:cpu,cpuacct:/pi",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
            "sys/fs/cgroup/cpu/pi/cpu.cfs_quota_us": 50000,
            "sys/fs/cgroup/cpu/pi/cpu.cfs_period_us": 100000,
        },
    )
    assert limits.cores(v1) == 0.5
    v2 = lay_out(
        tmp_path / "v2",
        {
            "proc/self/cgroup": "0::/a/b",
            f"{V2}/a/b/cpu.max": "max 100000",
            f"{V2}/a/cpu.max": "25000 100000",
        },
    )
    assert limits.cores(v2) == 0.25
    assert limits.cores(tmp_path) == int(limits.cores(tmp_path)) >= 1  # affinity alone


@pytest.mark.parametrize("text", ["", "max", "50000", "50000 0", "much 100000", "-1 100000", "² 1"])
def test_strange_quotas_are_none(tmp_path, text):
    lay_out(tmp_path, {"proc/self/cgroup": "0::/a", f"{V2}/a/cpu.max": text})
    assert limits.cores(tmp_path) == limits.cores(tmp_path / "nothing here")


def test_measure_here():
    measured = measure.measure(cap_bytes=64 * MiB, compute=False)
    assert measured.memory_available_bytes == 64 * MiB
    assert measured.memory_bound == "cap"
    assert measured.gflops == 0
    with pytest.raises(ConfigError, match="cap is 0 bytes"):
        measure.measure(cap_bytes=0, compute=False)


def test_measured_compute_is_a_real_figure():
    assert 0.01 < speed.measure_gflops(seconds=0.1, threads=1) < 100_000


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 9), (3600.0, 50)])
def test_layers_are_measured_for_a_limited_time(monkeypatch, seconds, steps):
    monkeypatch.setattr(speed, "LAYER_S", seconds)
    paces = iter([1000.0, *(float(10 + n) for n in range(steps))])  # the first step warms up
    monkeypatch.setattr(speed, "_steps_per_s", lambda *_, **__: next(paces))
    measured = speed.measure_layer_s(threads=1)
    assert next(paces, None) is None, "as many steps were made"
    middle = sorted(1 / (10 + n) for n in range(steps))[(steps - 1) // 2 : steps // 2 + 1]
    assert measured == pytest.approx(sum(middle) / len(middle) / 24)  # 8 blocks of 3 layers


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), speed.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_light_modules_import_nothing_heavy():
    code = (
        "import sys, edge_sdk.hardware.measure as p, edge_sdk.capacity.costs;"
        "import edge_sdk.hardware.boards as b;"
        "p.measure(compute=False); b.board('generic');"
        "print(sorted({'torch', 'numpy', 'zmq', 'ray'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.root
def test_real_memory_group_is_seen(tmp_path):
    """A child process in a real 200 MiB group measures that bound."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    mount, limit = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v2, "memory.max")
    group = mount / f"edge-test-{tmp_path.name}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory group can be made under {mount}: {error}")
    try:
        if not (group / limit).exists():
            pytest.skip(f"the memory controller is not enabled under {mount}")
        (group / limit).write_text(str(200 * MiB))
        code = (
            f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()));"
            "from edge_sdk.hardware.measure import measure; p = measure(compute=False);"
            "print(p.memory_bound, p.memory_available_bytes)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        bound, available_bytes = run.stdout.split()
        assert bound == "cgroup"
        assert 100 * MiB < int(available_bytes) <= 200 * MiB
    finally:
        group.rmdir()
