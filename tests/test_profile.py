"""Memory, cores and platform from made-up /proc and /sys trees; the boards' files."""

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_sdk import profile
from edge_sdk.errors import ConfigError

MiB = 1024**2


def lay_out(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def test_no_cgroups_means_no_limit(tmp_path):
    assert profile.cgroup_bytes_left(tmp_path) is None


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
    assert profile.cgroup_bytes_left(tmp_path) == 300 * MiB


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
    assert profile.cgroup_bytes_left(tmp_path) == 350 * MiB


def test_v2_without_any_limit(tmp_path):
    lay_out(tmp_path, {"proc/self/cgroup": "0::/a", f"{V2}/a/memory.max": "max"})
    assert profile.cgroup_bytes_left(tmp_path) is None


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
    assert profile.cgroup_bytes_left(tmp_path) == 200 * MiB


def test_usage_above_the_limit_leaves_nothing(tmp_path):
    lay_out(
        tmp_path,
        {"proc/self/cgroup": "0::/a", f"{V2}/a/memory.max": 10, f"{V2}/a/memory.current": 30},
    )
    assert profile.cgroup_bytes_left(tmp_path) == 0


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
    assert profile.cgroup_bytes_left(tmp_path) == 180 * MiB  # 400 - (250 - 30)


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
    assert profile.cgroup_bytes_left(tmp_path) == 300 * MiB


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
    assert profile.cgroup_bytes_left(tmp_path) == 150 * MiB


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
    assert profile.least_bound(host, cgroup, cap, own) == expected


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
    assert profile.cores(v1) == 0.5
    v2 = lay_out(
        tmp_path / "v2",
        {
            "proc/self/cgroup": "0::/a/b",
            f"{V2}/a/b/cpu.max": "max 100000",
            f"{V2}/a/cpu.max": "25000 100000",
        },
    )
    assert profile.cores(v2) == 0.25
    assert profile.cores(tmp_path) == int(profile.cores(tmp_path)) >= 1  # affinity alone


@pytest.mark.parametrize(
    ("model", "platform"),
    [
        ("Raspberry Pi 4 Model B Rev 1.4", "raspberry-pi-4"),
        ("Raspberry Pi Compute Module 4 Rev 1.0", "raspberry-pi-4"),
        ("Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"),
        ("Raspberry Pi Zero 2 W Rev 1.0", "raspberry-pi-zero-2w"),
        ("NVIDIA Jetson Nano Developer Kit", "jetson-nano"),
        ("NVIDIA Jetson TX2 Developer Kit", "jetson-tx2"),
        ("NVIDIA Jetson Xavier NX Developer Kit", "jetson-xavier-nx"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "jetson-orin-nano"),
        ("Radxa ROCK 5B", "generic"),
    ],
)
def test_platform_from_the_device_tree(tmp_path, model, platform):
    lay_out(tmp_path, {"sys/firmware/devicetree/base/model": f"{model}\0"})
    assert profile.board_name(tmp_path) == (platform, model)


def test_platform_without_a_device_tree(tmp_path):
    assert profile.board_name(tmp_path) == ("generic", "")


class JtopException(Exception):
    pass


def fake_jtop(monkeypatch: pytest.MonkeyPatch, enter: Callable[[], object]) -> None:
    class Jtop:
        def __enter__(self):
            return enter()

        def __exit__(self, *_):
            return None

    module = types.ModuleType("jtop")
    module.jtop, module.JtopException = Jtop, JtopException  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jtop", module)
    profile.jetson_module.cache_clear()


def test_jetson_stats_names_the_module(monkeypatch, tmp_path):
    board = {"hardware": {"Module": "NVIDIA Jetson Nano (4 GB ram)"}}
    fake_jtop(monkeypatch, lambda: types.SimpleNamespace(board=board))
    lay_out(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0"})
    assert profile.board_name(tmp_path) == ("jetson-nano", "NVIDIA Jetson Nano (4 GB ram)")
    profile.jetson_module.cache_clear()


@pytest.mark.parametrize("error", [JtopException("service is not active"), OSError("socket")])
def test_jetson_stats_without_its_service_is_no_error(monkeypatch, error):
    def enter():
        raise error

    fake_jtop(monkeypatch, enter)
    assert profile.jetson_module() == ""
    profile.jetson_module.cache_clear()


def test_measure_here():
    measured = profile.measure(cap_bytes=64 * MiB, compute=False)
    assert measured.memory_available_bytes == 64 * MiB
    assert measured.memory_bound == "cap"
    assert measured.gflops == 0
    with pytest.raises(ConfigError, match="cap is 0 bytes"):
        profile.measure(cap_bytes=0, compute=False)


def test_measured_compute_is_a_real_figure():
    assert 0.01 < profile.measure_gflops(seconds=0.1, threads=1) < 100_000


def test_every_board_file_is_whole():
    assert len(profile.board_names()) == 8
    for name in profile.board_names():
        board = profile.board(name)
        assert board.platform == name
        assert board.memory_available_bytes < board.memory_total_bytes


def test_emulated_board_scales_cpu_time():
    board = profile.board("raspberry-pi-4")  # 12 GFLOPS
    emulated = profile.emulated(board, host_gflops=30.0)
    assert emulated.is_emulated
    assert emulated.cpu_scale == pytest.approx(2.5)  # 30 / 12
    assert emulated.memory_available_bytes == board.memory_available_bytes


def test_unknown_board_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'pi-4'; known: generic, jetson-nano.*raspberry-pi-5"):
        profile.board("pi-4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gflops = 40.0", 'gflops = "fast"'), r"mine.toml: Expected `float`.*\$\.gflops"),
        (("gflops = 40.0", "gflops = 0.0"), r"mine.toml: Expected `float` > 0.*\$\.gflops"),
        (("gflops = 40.0", ""), r"mine.toml:.*`gflops`"),
        (("cores = 4.0", "cores = 4.0\nram = 1"), r"mine.toml:.*`ram`"),
        (('link_mbit_s = "Nom', 'lnk = "Nom'), r"mine.toml: \[source\] lacks link_mbit_s"),
        (("[source]", "[source"), r"mine.toml: "),
    ],
)
def test_bad_board_file_names_file_and_key(tmp_path, change, message):
    text = (profile.board_folder() / "generic.toml").read_text()
    assert change[0] in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=message):
        profile.board(str(path))


def test_missing_board_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"mine\.toml: No such file"):
        profile.board(str(tmp_path / "mine.toml"))


def test_light_modules_import_nothing_heavy():
    code = (
        "import sys, edge_sdk.profile as p, edge_sdk.capacity, edge_sdk.wire, edge_sdk.errors;"
        "p.measure(compute=False); p.board('generic');"
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
            "from edge_sdk.profile import measure; p = measure(compute=False);"
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
