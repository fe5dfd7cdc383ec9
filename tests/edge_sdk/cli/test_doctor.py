"""Each check of the doctor with a good and a bad answer; files of a board under tmp_path."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import pytest

from coordinator.admission.client_list import Admission, add_client
from coordinator.links.router import Router
from edge_sdk.cli import doctor, main
from edge_sdk.cli.doctor import Finding
from edge_sdk.hardware import jetson
from edge_sdk.protocol.keys import make_keys, read_all_keys
from tests.support.devices import ANY_PORT
from tests.support.jtop_fake import JtopException, fake_jtop, orin, refuses
from tests.support.processes import free_port

GIB = 1024**3
NOW = datetime.datetime(2026, 11, 21, 12, 0, tzinfo=datetime.timezone.utc)


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_system_and_python():
    assert doctor.check_system("aarch64", 64).outcome == "ok"
    assert "64-bit image" in doctor.check_system("armv7l", 32).advice
    assert doctor.check_python().outcome == "ok"
    assert doctor.check_python((3, 9, 2)) == Finding(
        "python", "fail", "3.9.2", "Python 3.10 or later is needed"
    )


@pytest.mark.parametrize(
    ("probe", "outcome", "found", "advice"),
    [
        ('print(\'["2.9.1", "NEON", false]\')', "ok", "2.9.1, CPU capability NEON, CUDA no", ""),
        ("import os; os.kill(os.getpid(), 4)", "fail", "SIGILL", "'torch>=2.8,<2.10'"),
        ("import os; os.kill(os.getpid(), 9)", "fail", "most likely for memory", "pip install"),
        ("import no_such_torch", "fail", "No module named 'no_such_torch'", "NVIDIA makes"),
        ('print(\'["1.13.1", "NEON", true]\')', "fail", "1.13.1, expected 2.1 or later", "[torch]"),
    ],
    ids=["good", "illegal instruction", "killed", "missing", "too old"],
)
def test_torch_is_asked_in_another_process(probe, outcome, found, advice):
    finding = doctor.check_torch("cpu", probe)
    assert finding.outcome == outcome
    assert found in finding.found
    assert advice in finding.advice


def test_torch_without_cuda_where_the_config_wants_it():
    finding = doctor.check_torch("cuda", 'print(\'["2.9.1", "NEON", false]\')')
    assert finding.outcome == "fail"
    assert 'device = "cuda"' in finding.advice


def test_memory(tmp_path):
    assert doctor.check_memory(None, lay(tmp_path, {})).name == "memory"
    finding = doctor.check_memory(200 * 1024**2, tmp_path)
    assert (finding.outcome, finding.advice.rpartition("; ")[2]) == ("warn", "raise memory_cap")


V1 = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t1\t1\t1\nmemory\t0\t72\t{}\n"


@pytest.mark.parametrize(
    ("files", "outcome", "advice"),
    [
        ({"sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n"}, "ok", ""),
        ({"proc/cgroups": V1.format(1)}, "ok", ""),
        (
            {
                "proc/cgroups": V1.format(0),
                "sys/fs/cgroup/cgroup.controllers": "cpu io pids",
                "boot/firmware/cmdline.txt": "console=tty1",
            },
            "warn",
            "add cgroup_enable=memory cgroup_memory=1 to the one line of "
            "/boot/firmware/cmdline.txt",
        ),
        ({"boot/cmdline.txt": "console=tty1"}, "warn", "line of /boot/cmdline.txt and reboot"),
        ({}, "warn", "line of the kernel command line and reboot"),
    ],
    ids=["version 2", "version 1", "Raspberry Pi OS", "an older one", "another"],
)
def test_memory_cgroup(tmp_path, files, outcome, advice):
    finding = doctor.check_memory_group(lay(tmp_path, files))
    assert finding.outcome == outcome
    assert advice in finding.advice


def test_clock(tmp_path):
    assert doctor.check_clock(NOW, tmp_path).outcome == "ok"
    past = doctor.check_clock(NOW.replace(year=1970), tmp_path)
    assert (past.outcome, past.found[:16]) == ("fail", "1970-11-21 12:00")
    lay(tmp_path, {"run/systemd/timesync/clock": ""})
    assert "not synchronised yet" in doctor.check_clock(NOW, tmp_path).found
    lay(tmp_path, {"run/systemd/timesync/synchronized": ""})
    assert doctor.check_clock(NOW, tmp_path).outcome == "ok"


def test_disk(tmp_path, monkeypatch):
    assert doctor.check_disk(tmp_path).outcome == "ok"
    missing = doctor.check_disk(tmp_path / "no" / "such")
    assert missing.found.endswith(f"free at {tmp_path}")
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**70)
    assert doctor.check_disk(tmp_path).outcome == "warn"


MODEL = {"proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0"}
RELEASE = "# R{} (release), REVISION: {}, GCID: 1, BOARD: generic, EABI: aarch64"


@pytest.mark.parametrize(
    ("files", "outcome", "found"),
    [
        ({"proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0"}, "ok", "this is none"),
        (MODEL, "warn", "jetson-orin-nano without JetPack"),
        (
            MODEL | {"etc/nv_tegra_release": RELEASE.format(36, "4.3")},
            "ok",
            "JetPack 6 (Jetson Linux 36.4.3), no jetson-stats",
        ),
        (
            MODEL | {"etc/nv_tegra_release": RELEASE.format(32, "7.1")},
            "warn",
            "JetPack 4 (Jetson Linux 32.7.1)",
        ),
    ],
    ids=["none", "without JetPack", "JetPack 6", "JetPack 4"],
)
def test_jetson(tmp_path, files, outcome, found):
    finding = doctor.check_jetson(lay(tmp_path, files))
    assert (finding.outcome, finding.found) == (outcome, found)


def test_jetson_stats_needs_its_service(tmp_path, monkeypatch):
    lay(tmp_path, MODEL | {"etc/nv_tegra_release": RELEASE.format(36, "4.3")})
    site = lay(tmp_path / "site", {"jetson_stats-4.3.1.dist-info/METADATA": "Version: 4.3.1\n"})
    monkeypatch.syspath_prepend(str(site))
    finding = doctor.check_jetson(tmp_path)
    assert finding.outcome == "warn"
    assert finding.found.endswith(", jetson-stats 4.3.1")
    lay(tmp_path, {"run/jtop.sock": ""})
    fake_jtop(monkeypatch, orin)
    assert doctor.check_jetson(tmp_path).outcome == "ok"
    said = "Mismatch version jtop service: [4.2.1] and client: [4.3.1]. Please run:\n\nsudo jtop"
    fake_jtop(monkeypatch, refuses(JtopException(said)))
    finding = doctor.check_jetson(tmp_path)
    assert finding.outcome == "warn"
    assert "service has version 4.2.1, the package of this Python 4.3.1" in finding.found
    assert finding.advice.startswith("install one version for both")
    jetson.jetson_module.cache_clear()


ZONE = "sys/class/thermal/thermal_zone0"
HOT = {f"{ZONE}/type": "cpu-thermal", f"{ZONE}/temp": "79000"}
FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"
BATTERY = {"sys/class/power_supply/B/type": "Battery", "sys/class/power_supply/B/capacity": "8"}


@pytest.mark.parametrize(
    ("files", "outcome", "found", "advice"),
    [
        ({}, "ok", "nothing known: full work", ""),
        (HOT, "ok", "cpu-thermal 79 °C: full work", ""),  # without a limit nobody knows
        (HOT | {FLAGS: "0"}, "warn", "short work, as cpu-thermal is at 79 °C", "cool it"),
        ({FLAGS: "4"}, "warn", "throttled: short work", "cool it"),
        ({FLAGS: "50005"}, "warn", "throttled, under-voltage: short", "the supply is too weak"),
        (
            BATTERY | {"sys/class/power_supply/B/status": "Discharging"},
            "warn",
            "battery 8 %, discharging: no work",
            "charge it",
        ),
        (BATTERY | {"sys/class/power_supply/B/status": "Charging"}, "ok", "full work", ""),
    ],
)
def test_conditions(tmp_path, files, outcome, found, advice):
    finding = doctor.check_conditions(lay(tmp_path, files))
    assert finding.outcome == outcome
    assert found in finding.found
    assert finding.advice.startswith(advice)
    assert bool(finding.advice) == (outcome != "ok")


def test_data(tmp_path):
    file = tmp_path / "data.npz"
    assert doctor.check_data(None, is_service=True).outcome == "warn"
    assert doctor.check_data("digits", is_service=True).outcome == "ok"
    assert "No such file" in doctor.check_data(str(file), is_service=False).found
    assert "null" in doctor.check_data("/a\0b", is_service=False).found
    file.touch(0o600)
    assert doctor.check_data(str(file), is_service=False).outcome == "ok"
    hidden = doctor.check_data("/home/pi/data.npz", is_service=True)
    assert (hidden.outcome, hidden.advice) == ("fail", "move it to /var/lib/edge-sdk")


def test_data_that_only_its_owner_can_read(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "is_hidden", lambda path: False)  # tmp_path is under /tmp
    file = tmp_path / "data.npz"
    file.touch(0o600)
    assert doctor.check_data(str(file), is_service=True).advice == f"chmod a+r {file}"
    file.chmod(0o644)
    assert doctor.check_data(str(file), is_service=True).outcome == "ok"


def test_keys(tmp_path):
    check = doctor.check_keys
    assert check(tmp_path, None, is_insecure=True)[1].outcome == "warn"
    pair, finding = check(tmp_path, None, is_insecure=False)
    assert (pair, finding.outcome) == (None, "fail")
    assert finding.found.endswith("device.public cannot be read: No such file or directory")
    for step in ("join LINE", "keys"):
        assert f"edge-sdk {step} --keys {tmp_path}" in finding.advice
    made = make_keys(tmp_path, "device")
    finding = check(tmp_path, None, is_insecure=False)[1]
    assert "server.public cannot be read" in finding.found
    assert finding.advice == "copy the coordinator's server.public there, or give --server-key"
    pair, finding = check(tmp_path, made.public.decode(), is_insecure=False)
    assert (pair, finding.outcome) == ((made, made.public), "ok")
    (tmp_path / "device.secret").chmod(0o644)
    finding = check(tmp_path, made.public.decode(), is_insecure=False)[1]
    assert "others can read it; run chmod 600" in finding.found


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root rights")
def test_keys_that_the_services_user_cannot_read(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "STATE", tmp_path)
    made = make_keys(tmp_path / "keys", "device")
    os.chown(tmp_path, 61999, 61999)
    finding = doctor.check_keys(tmp_path / "keys", made.public.decode(), is_insecure=False)[1]
    assert finding.outcome == "fail"
    assert finding.advice.startswith(f"chown 61999 {tmp_path}/keys/*")


def test_a_coordinator_that_knows_this_device_and_one_that_does_not(tmp_path):
    server, device = make_keys(tmp_path, "server"), make_keys(tmp_path, "device")
    add_client(tmp_path / "clients", "other", server.public)
    router = Router(ANY_PORT, server, Admission(tmp_path / "clients"))
    keys = read_all_keys(tmp_path, None)
    try:
        without = doctor.check_coordinator(router.endpoint, None, is_insecure=False)
        assert (without.outcome, without.advice) == ("warn", "make keys")
        stranger = doctor.check_coordinator(router.endpoint, keys, is_insecure=False)
        assert stranger.outcome == "fail"
        assert "does not know this device's key" in stranger.found
        assert stranger.advice == "add its public key to the coordinator's list"
        plain = doctor.check_coordinator(router.endpoint, None, is_insecure=True)
        assert "do not agree on encryption" in plain.found
        add_client(tmp_path / "clients", "pi-1", device.public)
        assert doctor.check_coordinator(router.endpoint, keys, is_insecure=False).outcome == "ok"
    finally:
        router.close()


def test_a_coordinator_that_is_not_there():
    nobody = f"tcp://127.0.0.1:{free_port()}"
    finding = doctor.check_coordinator(nobody, None, is_insecure=False)
    assert finding.outcome == "fail"
    assert "Connection refused" in finding.found
    nowhere = doctor.check_coordinator("tcp://a..b:5555", None, is_insecure=False)
    assert nowhere.outcome == "fail"
    assert "tcp://a..b:5555 is not reached" in nowhere.found
    assert doctor.check_coordinator(None, None, is_insecure=False).outcome == "warn"


@pytest.fixture
def quick_torch(monkeypatch):
    """The real one is asked in tests/system."""
    check = doctor.check_torch
    probe = 'print(\'["2.9.1", "NEON", false]\')'
    monkeypatch.setattr(doctor, "check_torch", lambda device: check(device, probe))


def test_the_command_prints_all_and_fails_if_one_does(tmp_path, capsys, quick_torch):
    make_keys(tmp_path / "keys", "device")
    (tmp_path / "keys" / "server.public").write_bytes(
        (tmp_path / "keys" / "device.public").read_bytes()
    )
    config = tmp_path / "c.toml"
    config.write_text(f'data = "digits"\nkeys = "{tmp_path}/keys"\n')
    assert main.main(["doctor", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert f"ok    config         {config}\n" in out
    assert "warn  coordinator    not set\n                     set coordinator in " in out

    config.write_text("threads = -1\n")
    assert main.main(["doctor", "--config", str(config), "--json"]) == 1
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert "line 1, key threads: got -1" in findings["config"]["found"]
    assert list(findings) == [
        "system",
        "python",
        "config",
        "torch",
        "memory",
        "memory cgroup",
        "clock",
        "disk",
        "jetson",
        "conditions",
        "data",
        "keys",
        "coordinator",
    ]
