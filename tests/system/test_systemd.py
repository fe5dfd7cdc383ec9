"""The installed service under a real systemd: real unit, agent, trainer with torch, and limits."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from coordinator.admission.client_list import add_client
from tests.support.processes import World, environment, wait_until
from tests.system.machine import PREFIX, Machine, lacks

LACKS = lacks()
pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKS), reason=f"no systemd can be booted: {LACKS}"),
]
CONFIG = "/etc/edge-sdk/config.toml"
UNIT = "/etc/systemd/system/edge-sdk.service"
KEYS = "/var/lib/edge-sdk/keys"
DATA = "/srv/data.npz"
START_S = 300.0  # torch is imported in 2 s, or in a minute on crowded cores
PROBE = """
import os, pathlib
for folder in {folders!r}:
    try:
        file = pathlib.Path(folder, "probe")
        file.write_text("x")
        file.unlink()
        print("PROBE may write", folder, flush=True)
    except OSError:
        pass
for folder in ("/home", "/root"):
    try:
        os.listdir(folder)
        print("PROBE sees", folder, flush=True)
    except OSError:
        pass
status = pathlib.Path("/proc/self/status").read_text()
facts = dict(line.split(":", 1) for line in status.splitlines())
print("PROBE is", os.getuid(), *(facts[k].strip() for k in ("CapEff", "NoNewPrivs", "Seccomp")),
      flush=True)
"""


class Service:
    """The installed service as its administrator sees it."""

    def __init__(self, machine: Machine, world: World) -> None:
        self.machine = machine
        self.world = world

    def configure(self, **changes: str) -> None:
        """Write the config anew; values as TOML."""
        keys = {
            "coordinator": f'"{self.world.endpoint}"',
            "data": f'"{DATA}"',
            "id": '"pi-1"',
            "keys": f'"{KEYS}"',
            "memory_cap": '"900M"',
            "threads": "1",
        } | changes
        text = "".join(f"{key.rstrip('_')} = {value}\n" for key, value in keys.items())
        self.machine.path(CONFIG).write_text(text)

    def begin(self, *lines: str, check: bool = True) -> None:
        """Install again and start anew, with a drop-in of these lines in [Service]."""
        folder = self.machine.path(f"{UNIT}.d")
        folder.mkdir(exist_ok=True)
        quick = ("RestartSec=1s", "WatchdogSec=10s", "Environment=OMP_NUM_THREADS=1")
        (folder / "test.conf").write_text("\n".join(["[Service]", *quick, *lines, ""]))
        self.machine.run("systemctl", "stop", "edge-sdk")
        self.forget()
        done = self.machine.edge_sdk("service", "install", "--start", check=False)
        assert done.returncode == 0 or not check, f"{done.stderr}\n{self.journal()}"

    def forget(self) -> None:
        """Only what the journal says from now on counts."""
        self.machine.run("journalctl", "--rotate")
        self.machine.run("journalctl", "--vacuum-time=1us")

    def shown(self, name: str) -> str:
        return self.machine.run("systemctl", "show", "edge-sdk", "-P", name).stdout.strip()

    def journal(self) -> str:
        return self.machine.edge_sdk("service", "logs", "--lines", "1000").stdout

    def kill(self, number: signal.Signals) -> None:
        """Signal the agent only."""
        self.machine.run(
            "systemctl", "kill", "--kill-whom=main", f"--signal={number.name}", "edge-sdk"
        )

    def restarts(self) -> int:
        return int(self.shown("NRestarts"))

    def wait_restarted(self, before: int) -> None:
        """Until it has been restarted once more than before and is ready."""

        def is_back() -> bool:
            return self.restarts() == before + 1 and self.shown("ActiveState") == "active"

        try:
            wait_until(is_back, "the service is back", START_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.journal()}") from error

    def wait_doing(self, pattern: str) -> None:
        """Until its status line matches."""
        try:
            wait_until(
                lambda: re.match(pattern, self.shown("StatusText")), f"doing {pattern}", START_S
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.journal()}") from error

    def trainers(self) -> list[int]:
        return [process.pid for process in self.machine.processes("edge_sdk.training --fd")]


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    """Installed, with keys and data, the device admitted, running; there is no coordinator yet."""
    folder = tmp_path_factory.mktemp("systemd")
    (folder / "world").mkdir()
    with World(folder / "world", num_devices=1) as world, Machine(folder) as machine:
        found = Service(machine, world)
        machine.edge_sdk("service", "install")
        machine.edge_sdk("keys", "--config", CONFIG)
        server_key = (world.keys / "server.public").read_bytes()
        machine.path(f"{KEYS}/server.public").write_bytes(server_key)
        public_key = machine.path(f"{KEYS}/device.public").read_text().strip()
        add_client(world.keys / "clients", "pi-1", public_key.encode())
        machine.path(DATA).write_bytes((world.folder / "a" / "data.npz").read_bytes())
        machine.path(DATA).chmod(0o644)
        found.configure()
        found.begin()
        yield found


def test_ready_when_the_data_is_read_without_a_coordinator(service):
    assert service.shown("ActiveState") == "active"  # so READY=1 was sent
    service.wait_doing("waiting for the coordinator tcp://")
    status = service.machine.edge_sdk("service", "status").stdout
    assert re.search(r"^service   active \(running\) since .*, enabled$", status, re.MULTILINE)
    assert re.search(r"^memory    \d+\.\d MiB of at most 964\.0 MiB$", status, re.MULTILINE)
    assert "restarts  0, last result: success" in status
    told = "not reached yet: .*Connection refused; waiting for it"
    wait_until(lambda: re.search(told, service.journal()), f"telling {told}", START_S)
    doctor = service.machine.edge_sdk("doctor", check=False)
    assert re.findall(r"^fail +(\w+)", doctor.stdout, re.MULTILINE) == ["coordinator"]
    assert doctor.returncode == 1


def test_the_keys_belong_to_the_services_own_user(service):
    """Made by root before the first start; the others are made by root after it."""
    uid = int(service.shown("UID"))
    assert uid >= 61184  # of the range for dynamic users
    service.machine.edge_sdk("keys", "--keys", "/var/lib/edge-sdk/others", "--id", "pi-2")
    for folder in ("keys", "others"):
        secret = service.machine.path(f"/var/lib/private/edge-sdk/{folder}/device.secret").stat()
        assert (secret.st_uid, secret.st_mode & 0o777) == (uid, 0o600)


def test_the_agent_survives_the_kill_of_its_trainer(service):
    agent, before = service.shown("MainPID"), service.restarts()
    (trainer,) = service.machine.processes("edge_sdk.training --fd")
    trainer.kill()
    wait_until(
        lambda: service.trainers() not in ([], [trainer.pid]), "another trainer starts", START_S
    )
    assert (service.shown("MainPID"), service.restarts()) == (agent, before)


def test_after_kill_9_another_agent_starts_and_no_trainer_is_left_over(service):
    trainers, before = service.trainers(), service.restarts()
    service.kill(signal.SIGKILL)
    service.wait_restarted(before)
    others = service.trainers()
    assert len(trainers) == len(others) == 1
    assert trainers != others


def test_an_agent_that_is_stuck_is_ended_by_the_watchdog(service):
    service.forget()
    before = service.restarts()
    service.kill(signal.SIGSTOP)
    service.wait_restarted(before)
    assert "Watchdog timeout (limit 10s)!" in service.journal()


def test_a_trainer_that_is_stuck_in_a_job_starves_the_watchdog(service):
    """Torch trains inside the sandbox; then the trainer stands still. The agent would end it after
    minutes; the shorter watchdog of this test is faster, and the device takes part again."""
    world, machine = service.world, service.machine
    service.forget()
    flags = world.serve_flags("--epochs", "100000", "--deadline", "1000000000", "--rounds", "9")
    log = world.folder / "serve.log"
    with log.open("wb") as output:
        coordinator = subprocess.Popen(
            machine.in_its_network(sys.executable, "-m", "coordinator.cli", *flags),
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=environment(world.mark),
        )
    try:
        before = service.restarts()
        service.wait_doing(r"round \d+: [1-9]\d*( of \d+)? batches done")
        doctor = machine.edge_sdk("doctor", check=False)
        assert doctor.returncode == 0, doctor.stdout
        assert f"ok    coordinator    {world.endpoint} takes this device's" in doctor.stdout
        (trainer,) = machine.processes("edge_sdk.training --fd")
        assert service.restarts() == before
        trainer.suspend()
        service.wait_restarted(before)
        assert "Watchdog timeout (limit 10s)!" in service.journal()
        assert not trainer.is_running()
        service.wait_doing(r"round \d+: [1-9]\d*( of \d+)? batches done")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()}") from error
    finally:
        coordinator.kill()
        coordinator.wait(30)


def test_memory_is_really_limited_and_the_agent_says_so(service):
    """A gigabyte of data under a limit of 564 MiB: only the trainer is killed."""
    machine = service.machine
    many = 1024**3 // 256
    x = np.zeros((many, 1, 8, 8), dtype=np.float32)
    with machine.path("/srv/big.npz").open("wb") as file:
        np.savez_compressed(file, x=x, y=np.arange(many) % 3)
    del x
    machine.path("/srv/big.npz").chmod(0o644)
    service.configure(data='"/srv/big.npz"', memory_cap='"500M"')
    service.begin("Restart=no", check=False)
    assert service.shown("MemoryMax") == str((500 + 64) * 1024**2)
    assert service.shown("Result") == "exit-code"  # the agent's own, not a signal
    assert "the trainer was killed by signal 9, most likely for memory before it had " in (
        service.journal()
    )
    machine.path("/srv/big.npz").unlink()


def test_only_its_own_folders_can_be_written(service):
    machine = service.machine
    own = ["/var/lib/edge-sdk", "/var/cache/edge-sdk", "/tmp", "/dev/shm"]
    others = [
        "/",
        "/etc",
        "/etc/edge-sdk",
        "/usr",
        "/opt/edge-sdk",
        "/var",
        "/var/lib",
        "/srv",
        "/home",
        "/root",
        "/run",
        "/sys/fs/cgroup/memory",
        "/proc/sys/kernel",
    ]
    machine.path("/srv").chmod(0o777)  # not even what everyone may write
    (site,) = machine.path(PREFIX).glob("lib/*/site-packages")
    (site / "probe.py").write_text(PROBE.format(folders=own + others))
    service.configure(import_='["probe"]')
    service.begin("Restart=no")
    said = re.findall(r"PROBE (.*)", service.journal())
    assert [f"may write {folder}" for folder in own] == said[:-1]
    assert re.fullmatch(r"is [1-9]\d+ 0000000000000000 1 2", said[-1])
    assert not list(machine.path("/tmp").glob("probe*"))  # its /tmp is its own
    machine.path("/srv").chmod(0o755)


def test_upgrade_keeps_keys_and_config_and_remove_does_unless_told(service):
    machine = service.machine
    service.begin()
    secret = machine.path("/var/lib/private/edge-sdk/keys/device.secret")
    kept = [(file, file.read_bytes()) for file in (machine.path(CONFIG), secret)]
    agent = service.shown("MainPID")
    machine.path(UNIT).write_text("# of an older version\n[Service]\nExecStart=/bin/false\n")
    machine.edge_sdk("service", "install", "--start")
    assert f"ExecStart={PREFIX}/bin/edge-sdk run --config" in machine.path(UNIT).read_text()
    assert service.shown("ActiveState") == "active"
    assert service.shown("MainPID") != agent
    assert all(file.read_bytes() == before for file, before in kept)

    machine.run("systemctl", "stop", "edge-sdk")
    assert service.shown("Result") == "success"
    assert machine.edge_sdk("service", "status", check=False).returncode == 1
    machine.edge_sdk("service", "remove")
    assert not machine.path(UNIT).exists()
    assert service.shown("ActiveState") == "inactive"
    assert all(file.read_bytes() == before for file, before in kept)
    assert "not installed" in machine.edge_sdk("service", "status", check=False).stderr

    machine.edge_sdk("service", "install")
    machine.edge_sdk("service", "remove", "--purge")
    assert not [file for file, _ in kept if file.exists()]
    assert not machine.path("/var/lib/private/edge-sdk").exists()
