"""The unit's text and the files of an installation; tests/system runs it under a real systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.agent.settings import EXPECTED, Settings, parse_config
from edge_sdk.cli import main, service, systemd_unit
from edge_sdk.cli.systemd_unit import unit_text
from edge_sdk.errors import ConfigError

CONFIG = Path("/etc/edge-sdk/config.toml")
COMMAND = ("/opt/edge-sdk/bin/edge-sdk",)
ANALYZE = shutil.which("systemd-analyze")
needs_analyze = pytest.mark.skipif(not ANALYZE, reason="needs systemd-analyze")


def lines(unit: str) -> list[str]:
    return [line for line in unit.splitlines() if line and not line.startswith("#")]


def test_the_unit_starts_this_installation_and_has_no_placeholder_left():
    unit = unit_text(Settings(), COMMAND, CONFIG)
    assert f"ExecStart={COMMAND[0]} run --config {CONFIG}" in unit
    assert not [
        line
        for line in lines(unit)
        if "@" in line and "=@system-service" not in line and "=~@privileged" not in line
    ]
    for line in (
        "Type=notify",
        "DynamicUser=yes",
        "OOMPolicy=continue",
        "KillMode=mixed",
        "Restart=on-failure",
        "WatchdogSec=600s",
        "ProtectSystem=strict",
    ):
        assert line in lines(unit)


def test_memory_is_the_cap_and_the_agents_share_or_a_part_of_the_machines():
    capped = unit_text(Settings(memory_cap="512M"), COMMAND, CONFIG)
    assert f"MemoryMax={(512 + 64) * 1024**2}" in lines(capped)
    assert "MemoryMax=80%" in lines(unit_text(Settings(), COMMAND, CONFIG))


def test_what_exceeds_the_limit_is_not_swapped():
    assert "MemorySwapMax=0" in lines(unit_text(Settings(), COMMAND, CONFIG))


def test_groups_are_those_of_the_system_that_is_installed_into(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/group").write_text("root:x:0:\nvideo:x:44:pi\nvideos:x:45:\n")
    assert systemd_unit.existing_groups(tmp_path) == ["video"]
    assert systemd_unit.existing_groups(tmp_path / "nothing") == []


def test_pauses_grow_where_systemd_can():
    old, new = (unit_text(Settings(), COMMAND, CONFIG, systemd_version=v) for v in (253, 254))
    assert "RestartSec=30s" in lines(old)
    assert "RestartSteps" not in old
    assert {"RestartSec=5s", "RestartSteps=6", "RestartMaxDelaySec=5min"} <= set(lines(new))


def test_devices_and_groups_only_where_they_are_needed():
    groups = ["video", "render"]
    cpu = lines(unit_text(Settings(), COMMAND, CONFIG, groups=groups))
    assert {"PrivateDevices=yes", "PrivateUsers=yes"} <= set(cpu)
    assert not [line for line in cpu if line.startswith("Supplementary")]
    gpu = lines(unit_text(Settings(device="cuda"), COMMAND, CONFIG, groups=groups))
    assert "SupplementaryGroups=video render" in gpu
    # ProtectClock would allow no device but clocks where systemd is older than 253
    assert not {"PrivateDevices=yes", "PrivateUsers=yes", "ProtectClock=yes"} & set(gpu)
    assert "ProtectClock=yes" in cpu
    jetson = lines(unit_text(Settings(), COMMAND, CONFIG, groups=[*groups, "jtop"]))
    assert "SupplementaryGroups=jtop" in jetson


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/opt/a-b/c.toml", "/opt/a-b/c.toml"),
        ("/opt/two words", '"/opt/two words"'),
        ("/opt/100%", "/opt/100%%"),
        ("/opt/$HOME", "/opt/$$HOME"),
        ('/opt/"x"', '"/opt/\\"x\\""'),
    ],
)
def test_words_of_the_command_are_taken_literally(word, written):
    assert systemd_unit.quoted(word) == written


@needs_analyze
@pytest.mark.parametrize("settings", [Settings(), Settings(device="cuda")], ids=["cpu", "cuda"])
def test_systemd_finds_nothing_wrong_and_little_exposed(tmp_path, settings):
    unit = tmp_path / "edge-sdk.service"
    unit.write_text(unit_text(settings, [sys.executable], CONFIG, groups=["video"]))
    run = subprocess.run
    verified = run([ANALYZE, "verify", unit], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")  # an unknown key is only a warning
    rated = run(
        [ANALYZE, "security", "--offline=yes", "--threshold=25", "--no-pager", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    assert rated.returncode == 0, rated.stdout + rated.stderr


# -- installing -----------------------------------------------------------------------------------


def installed(root: Path, *flags: str) -> int:
    return main.main(["service", "install", "--root", str(root), *flags])


def test_a_new_installation_in_a_folder(tmp_path, capsys):
    assert installed(tmp_path) == 0
    files = sorted(
        str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if not file.is_dir()
    )
    assert files == [
        "etc/edge-sdk/config.toml",
        "etc/systemd/system/edge-sdk.service",
        "etc/systemd/system/multi-user.target.wants/edge-sdk.service",
    ]
    link = tmp_path / files[2]
    assert os.readlink(link) == "/etc/systemd/system/edge-sdk.service"
    assert (tmp_path / files[0]).stat().st_mode & 0o777 == 0o644
    assert "next: set coordinator and data in /etc/edge-sdk/config.toml" in capsys.readouterr().out


def test_the_config_that_is_written_documents_every_key(tmp_path):
    installed(tmp_path)
    text = (tmp_path / "etc/edge-sdk/config.toml").read_text()
    assert parse_config(text, "new").given() == {"keys": "/var/lib/edge-sdk/keys"}
    every = "\n".join(
        line.removeprefix("#") for line in text.splitlines() if not line.startswith("# ")
    )
    every = every.replace("tcp://HOST:5555", "tcp://host:5555")
    assert set(EXPECTED) == {line.split(" = ")[0] for line in every.splitlines() if line}
    parse_config(every, "all of it")


def test_an_upgrade_rewrites_the_unit_and_keeps_the_config(tmp_path):
    installed(tmp_path)
    config = tmp_path / "etc/edge-sdk/config.toml"
    config.write_text('memory_cap = "300M"\n')
    assert installed(tmp_path) == 0
    assert config.read_text() == 'memory_cap = "300M"\n'
    unit = (tmp_path / "etc/systemd/system/edge-sdk.service").read_text()
    assert f"MemoryMax={364 * 1024**2}" in lines(unit)


def test_the_program_is_named_as_seen_from_the_root(tmp_path, monkeypatch):
    script = tmp_path / "opt/edge-sdk/bin/edge-sdk"
    script.parent.mkdir(parents=True)
    script.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert systemd_unit.own_command(tmp_path) == ["/opt/edge-sdk/bin/edge-sdk"]
    assert systemd_unit.own_command() == [str(script)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("threads = -1", "config.toml, line 1, key threads: got -1"),
        ('data = "/home/pi/data.npz"', "key data: the service does not see /home/pi/data.npz"),
        ('keys = "/root/keys"', "key keys: the service does not see /root/keys"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_the_unit_is_written(
    tmp_path, capsys, text, said
):
    config = tmp_path / "etc/edge-sdk/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(text)
    assert installed(tmp_path) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "etc/systemd").exists()


def test_a_dry_run_prints_the_unit_and_changes_nothing(tmp_path, capsys):
    assert installed(tmp_path, "--dry-run") == 0
    assert "MemoryMax=80%" in lines(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_removing_keeps_config_and_keys_unless_told(tmp_path):
    installed(tmp_path)
    keys = tmp_path / "var/lib/private/edge-sdk/keys"
    keys.mkdir(parents=True)
    (tmp_path / "var/lib/edge-sdk").symlink_to("private/edge-sdk")
    remove = ["service", "remove", "--root", str(tmp_path)]
    assert main.main(remove) == 0
    assert not list((tmp_path / "etc/systemd").rglob("edge-sdk.service"))
    assert (tmp_path / "etc/edge-sdk/config.toml").exists()
    assert keys.exists()
    assert main.main([*remove, "--purge"]) == 0
    assert not (tmp_path / "etc/edge-sdk/config.toml").exists()
    assert not (tmp_path / "var/lib/edge-sdk").is_symlink()
    assert not keys.parent.exists()


def test_programs_that_a_service_cannot_see(monkeypatch):
    assert systemd_unit.is_hidden("/home/pi/.venv/bin/edge-sdk")
    assert systemd_unit.is_hidden("/root")
    assert not systemd_unit.is_hidden("/homes/edge-sdk")
    monkeypatch.setattr(sys, "argv", ["/nowhere"])
    monkeypatch.setattr(sys, "executable", "/home/pi/.venv/bin/python")
    assert "a service does not see /home" in systemd_unit.hidden_program()
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert systemd_unit.hidden_program() == ""


@pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd runs this machine")
@pytest.mark.parametrize("action", ["install", "remove", "status", "logs"])
def test_without_systemd_there_is_one_clear_line(capsys, action):
    assert main.main(["service", action]) == 1
    assert capsys.readouterr().err.startswith("edge-sdk: this machine is not run by systemd; use ")


def test_without_root_the_line_says_what_to_type(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match=r"service install needs root; run sudo .*service instal"):
        service.check_root("service install")


def test_the_status_screen():
    found = {
        "UnitFileState": "enabled",
        "ActiveState": "activating",
        "SubState": "auto-restart",
        "StateChangeTimestamp": "Sat 2026-11-21 12:00:00 UTC",
        "StatusText": "",
        "MemoryCurrent": "[not set]",
        "MemoryMax": "infinity",
        "NRestarts": "3",
        "Result": "exit-code",
        "ExecMainStatus": "1",
    }
    assert service.describe(found) == (
        "service   activating (auto-restart) since Sat 2026-11-21 12:00:00 UTC, enabled\n"
        "doing     -\n"
        "memory    - of at most -\n"
        "restarts  3, last result: exit-code (status 1; see edge-sdk service logs)"
    )
    found |= {"MemoryCurrent": str(3 * 1024**2), "MemoryMax": str(4 * 1024**2), "StatusText": "x"}
    assert "memory    3.0 MiB of at most 4.0 MiB\n" in service.describe(found)


def test_a_config_that_the_service_does_not_see_is_refused():
    with pytest.raises(ConfigError, match="does not see /home/pi/c.toml, as it is under /home"):
        systemd_unit.check_visible(Settings(), Path("/home/pi/c.toml"))
    systemd_unit.check_visible(Settings(), CONFIG)
