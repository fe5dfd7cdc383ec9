"""Which board this is, by made-up device trees; the boards' files, read and written."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_sdk.errors import ConfigError
from edge_sdk.hardware import boards, jetson
from edge_sdk.hardware.boards import board, board_name, board_text, processor, save_board, save_path
from edge_sdk.hardware.measure import emulated
from tests.support.examples import lay_out
from tests.support.jtop_fake import fake_jtop, orin

MEMTOTAL = "MemTotal: {} kB"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nobody's own boards."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# -- this board -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "platform"),
    [
        ("Raspberry Pi 4 Model B Rev 1.4", "raspberry-pi-4"),
        ("Raspberry Pi 400 Rev 1.0", "raspberry-pi-4"),
        ("Raspberry Pi Compute Module 4 Rev 1.0", "raspberry-pi-4"),
        ("Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"),
        ("Raspberry Pi Zero 2 W Rev 1.0", "raspberry-pi-zero-2w"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "generic"),
        ("NVIDIA Jetson Nano Developer Kit", "jetson-nano"),
        ("NVIDIA Jetson TX2 Developer Kit", "jetson-tx2"),
        ("quill", "jetson-tx2"),
        ("NVIDIA Jetson Xavier NX Developer Kit", "jetson-xavier-nx"),
        ("NVIDIA Orin Nano Developer Kit", "jetson-orin-nano"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "jetson-orin-nano"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "jetson-orin-nano"),
        ("Radxa ROCK 5B", "generic"),
    ],
)
def test_platform_from_the_device_tree(tmp_path, model, platform):
    for folder in ("proc/device-tree", "sys/firmware/devicetree/base"):
        root = tmp_path / folder.split("/")[0]
        lay_out(root, {f"{folder}/model": f"{model}\0"})
        assert board_name(root) == (platform, model)


@pytest.mark.parametrize(
    ("model", "kib", "platform"),
    [
        # MemTotal: what firmware and kernel leave of the memory that was sold
        ("Raspberry Pi 4 Model B Rev 1.2", 1_939_032, "raspberry-pi-4-2gb"),
        ("Raspberry Pi 4 Model B Rev 1.4", 3_884_360, "raspberry-pi-4"),
        ("Raspberry Pi 4 Model B Rev 1.4", 7_998_620, "raspberry-pi-4-8gb"),
        ("Raspberry Pi 4 Model B Rev 1.1", 945_512, "raspberry-pi-4"),  # 1 GB has no file
        ("Raspberry Pi 5 Model B Rev 1.0", 8_256_272, "raspberry-pi-5"),
        ("Raspberry Pi Zero 2 W Rev 1.0", 437_460, "raspberry-pi-zero-2w"),
        ("Radxa ROCK 5B", 7_998_620, "generic"),
        ("Raspberry Pi 4 Model B Rev 1.4", "many", "raspberry-pi-4"),
    ],
)
def test_memory_tells_variants_apart(tmp_path, model, kib, platform):
    lay_out(
        tmp_path,
        {"proc/device-tree/model": f"{model}\0", "proc/meminfo": MEMTOTAL.format(kib)},
    )
    assert board_name(tmp_path) == (platform, model)
    assert platform in boards.board_names()


def test_no_device_tree_is_generic(tmp_path):
    assert board_name(tmp_path) == ("generic", "")


def test_a_strange_model_cannot_break_a_message(tmp_path):
    lay_out(tmp_path, {"proc/device-tree/model": "Ban\nana\x1b[31m\u2028" + 300 * "x"})
    assert board_name(tmp_path) == ("generic", ("Ban ana [31m " + 300 * "x")[:200])


def test_jetson_stats_names_the_module(monkeypatch, tmp_path):
    fake_jtop(monkeypatch, orin)
    lay_out(tmp_path, {"proc/device-tree/model": "NVIDIA Orin Nano Developer Kit\0"})
    assert board_name(tmp_path) == ("jetson-orin-nano", "NVIDIA Jetson Orin Nano (8GB ram)")
    lay_out(tmp_path, {"proc/device-tree/model": "Radxa ROCK 5B\0"})  # not asked
    assert board_name(tmp_path) == ("generic", "Radxa ROCK 5B")
    jetson.jetson_module.cache_clear()


# -- their files ----------------------------------------------------------------------------------

SHIPPED = sorted(path.stem for path in boards.board_folder().glob("*.toml"))


def test_every_board_file_is_whole():
    assert boards.board_names() == SHIPPED
    assert {"generic", "jetson-nano", "raspberry-pi-4-2gb"} < set(SHIPPED)
    for name in SHIPPED:
        found = board(name)
        assert found.platform == name
        assert found.memory_available_bytes < found.memory_total_bytes


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "generic"])
def test_every_board_knows_itself_by_its_device_tree(tmp_path, name):
    found = board(name)
    kib = found.memory_total_bytes // 1024 - 100_000  # the kernel takes some
    assert found.device_tree, f"say in {name}.toml what its device tree calls it"
    for part in found.device_tree:
        lay_out(
            tmp_path,
            {"proc/device-tree/model": f"{part}\0", "proc/meminfo": MEMTOTAL.format(kib)},
        )
        assert board_name(tmp_path)[0] == name


def test_variants_differ_in_memory_alone():
    whole = board("raspberry-pi-4")
    for gib in (2, 8):
        other = board(f"raspberry-pi-4-{gib}gb")
        assert other.memory_total_bytes == gib * boards.GIB
        taken = whole.memory_total_bytes - whole.memory_available_bytes
        assert other.memory_total_bytes - other.memory_available_bytes == taken
        assert (other.gflops, other.cores) == (whole.gflops, whole.cores)
        assert other.device_tree == whole.device_tree


def test_emulated_board_scales_cpu_time():
    pi = board("raspberry-pi-4")  # 12 GFLOPS
    profile = emulated(pi, host_gflops=30.0, host_layer_s=2e-6)
    assert profile.is_emulated
    assert profile.cpu_scale == pytest.approx(2.5)  # 30 / 12
    assert profile.layer_s == pytest.approx(5e-6)
    assert profile.memory_available_bytes == pi.memory_available_bytes
    measured = replace(pi, layer_s=4e-5, link_mbit_s=None)
    assert emulated(measured, host_gflops=30.0, host_layer_s=2e-6).layer_s == 4e-5
    assert emulated(measured, host_gflops=30.0).link_mbit_s is None


def test_unknown_board_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'pi-4'; known: generic, jetson-nano.*raspberry-pi-5"):
        board("pi-4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gflops = 40.0", 'gflops = "fast"'), r"mine.toml: Expected `float`.*\$\.gflops"),
        (("gflops = 40.0", "gflops = 0.0"), r"mine.toml: Expected `float` > 0.*\$\.gflops"),
        (("gflops = 40.0", "gflops = inf"), r"mine.toml: Expected `float` <= .*\$\.gflops"),
        (("gflops = 40.0", ""), r"mine.toml:.*`gflops`"),
        (("gflops = 40.0", "gflops = 40.0\nlayer_s = 1e-5"), r"\[source\] lacks layer_s"),
        (("cores = 4.0", "cores = 4.0\nram = 1"), r"mine.toml:.*`ram`"),
        (('link_mbit_s = "Nom', 'lnk = "Nom'), r"mine.toml: \[source\] lacks link_mbit_s"),
        (("[source]", "[source"), r"mine.toml: "),
    ],
)
def test_bad_board_file_names_file_and_key(tmp_path, change, message):
    text = (boards.board_folder() / "generic.toml").read_text()
    assert change[0] in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=message):
        board(str(path))


def test_missing_board_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"mine\.toml: No such file"):
        board(str(tmp_path / "mine.toml"))


# -- saving ---------------------------------------------------------------------------------------

MINE = boards.Board(
    platform="generic",
    board='A "board" \\ with ünusual \x7f signs',
    machine="x86_64",
    memory_total_bytes=2**33,
    memory_available_bytes=2**32,
    cores=0.5,
    gflops=12.25,
    layer_s=2.5e-05,
    source=dict.fromkeys(
        ("memory_total_bytes", "memory_available_bytes", "cores", "gflops", "layer_s"),
        'measured, "quoted", 1 % = 1\ttab',
    ),
)


def test_a_saved_board_is_the_same_when_it_is_read(tmp_path):
    path = tmp_path / "new" / "mine.toml"
    save_board(MINE, path)
    assert board(str(path)) == MINE
    assert [entry.name for entry in path.parent.iterdir()] == ["mine.toml"]  # no rest
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_name_is_saved_among_the_users_own_and_known_by_it(home):
    path = save_path("my-pi")
    assert path == home / ".config/edge-sdk/boards/my-pi.toml"
    save_board(MINE, path)
    assert board("my-pi") == MINE
    assert "my-pi" in boards.board_names()


def test_a_shipped_board_is_not_hidden_by_an_own_one_of_its_name(home):
    lay_out(home / ".config/edge-sdk/boards", {"generic.toml": board_text(MINE)})
    assert board("generic") != MINE
    with pytest.raises(ConfigError, match="generic is a board of this package; choose another"):
        save_path("generic")


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "100%", "a b", "x" * 61])
def test_bad_names_are_refused(name):
    with pytest.raises(ConfigError, match="expected 1 to 60 letters"):
        save_path(name)


def test_nothing_is_overwritten_unless_forced(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("mine")
    with pytest.raises(
        ConfigError, match=r"mine\.toml exists; choose another name, or give --force"
    ):
        save_board(MINE, path)
    assert path.read_text() == "mine"
    save_board(MINE, path, is_forced=True)
    assert board(str(path)) == MINE


def test_where_it_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written: Not a directory; choose another"):
        save_board(MINE, tmp_path / "file" / "folder" / "mine.toml")

    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match=r"mine\.toml cannot be written: No space left"):
        save_board(MINE, tmp_path / "mine.toml")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]  # nothing half-written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor : 0\nmodel name\t: A (R) 5\n\nprocessor : 1\nmodel name\t: A (R) 5\n",
            "A (R) 5",
        ),
        ("processor : 0\nCPU implementer : 0x41\nCPU part\t: 0xd08\n", "0x41 0xd08"),
        ("no colon\n", ""),
        ("", ""),
    ],
)
def test_processor(tmp_path, text, expected):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    assert processor(tmp_path) == expected
