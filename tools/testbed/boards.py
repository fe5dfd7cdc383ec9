"""The boards of a testbed: which ones, and what somebody would carry to each of them."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

from coordinator.admission.client_list import add_client
from coordinator.cohorts.population import split_shards
from edge_sdk.data.loading import Examples, load_dataset, save_shard
from edge_sdk.errors import ConfigError
from edge_sdk.hardware.boards import OWN_NAME, board
from edge_sdk.hardware.measure import emulated
from edge_sdk.protocol.keys import make_keys
from edge_sdk.protocol.messages import DeviceProfile

DEFAULT_DEVICES = "raspberry-pi-4=4,jetson-nano=4,jetson-tx2=4"


@dataclass(frozen=True)
class Host:
    """This machine, one thread: training GFLOP/s, and seconds of a layer beside its arithmetic."""

    gflops: float
    layer_s: float


@dataclass(frozen=True, eq=False)
class Device:
    """One emulated board: its name, the board's name or file, its own folder and data."""

    name: str
    board: str
    profile: DeviceProfile
    folder: Path
    examples: Examples


def prepare(args: argparse.Namespace, folder: Path, host: Host) -> list[Device]:
    """Shards, keys and folders: what somebody would carry to each board."""
    data = load_dataset(args.data, args.seed, args.examples)
    platforms = parse_devices(args.devices)
    boards = {f"{short(b)}-{i}": b for b, count in platforms for i in range(1, count + 1)}
    profiles = {b: emulated(board(b), host.gflops, host.layer_s) for b, _ in platforms}
    split = "dirichlet" if data.train.task == "classify" else "iid"  # of what has no classes
    shards = split_shards(data.train, len(boards), split=split, alpha=args.alpha, seed=args.seed)
    keys = folder / "keys"
    make_keys(keys, "server")
    save_shard(folder / "test.npz", data.test)
    devices = []
    for (name, file), shard in zip(boards.items(), shards, strict=True):
        device = Device(name, file, profiles[file], folder / "devices" / name, shard)
        pair = make_keys(device.folder, "device")
        shutil.copy(keys / "server.public", device.folder)
        add_client(keys / "clients", name, pair.public)
        save_shard(device.folder / "data.npz", shard)
        devices.append(device)
    return devices


def parse_devices(text: str) -> list[tuple[str, int]]:
    """[(board, count)] from "raspberry-pi-4=4,my.toml=4". Raises ConfigError."""
    found = []
    for part in text.split(","):
        name, equals, count = part.strip().rpartition("=")
        if not equals or not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"--devices {part!r} is not BOARD=COUNT, e.g. {DEFAULT_DEVICES}")
        if name.endswith(".toml") and not OWN_NAME.fullmatch(short(name)):
            raise ConfigError(f"--devices {name}: rename it, letters, digits, dots, - and _ only")
        found.append((name.strip(), int(count)))
    if len({short(name) for name, _ in found}) < len(found):
        raise ConfigError(f"--devices {text!r} names a board twice")
    return found


def short(name_or_path: str) -> str:
    """A board's name, also of a file's path: my-pi of boards/my-pi.toml."""
    return Path(name_or_path).name.removesuffix(".toml")
