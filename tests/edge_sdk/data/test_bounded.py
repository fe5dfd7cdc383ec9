"""Files that unpack to far more than they say, or say far more than they hold."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from edge_sdk.data import bounded
from edge_sdk.data.loading import load_shard
from edge_sdk.errors import DataError
from tests.support.data_files import LABELS, PIXELS, fails, idx_bytes, write_idx, write_npz

ZEROS = bytes(64 * 1024**2)
LITTLE = 8 * 1024**2  # what reading may take beside the packed file


@pytest.fixture(autouse=True)
def _little_memory():
    """numpy's arrays and zlib's output are traced."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < LITTLE


NPY = io.BytesIO()
np.save(NPY, np.zeros((4, 1, 8, 8), np.float32))
MORE = NPY.getvalue() + ZEROS
PACKED = gzip.compress(idx_bytes(PIXELS) + ZEROS)


def npy_header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    said = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, said)
    return file.getvalue()


def with_x(path, content: bytes) -> str:
    """An .npz whose member x.npy is that."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
        with archive.open("y.npy", "w") as file:
            np.save(file, np.array([0, 1, 2, 0]))
    return str(path)


def test_an_idx_file_with_much_behind_its_images(tmp_path):
    path = write_idx(tmp_path, "train", PIXELS, LABELS, ".gz")
    path.write_bytes(PACKED)
    fails(lambda: load_shard(str(path)), "more than 6 bytes, expected 6, as its header says")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_an_idx_file_that_promises_much(tmp_path, ending):
    path = write_idx(tmp_path, "train", PIXELS, LABELS, ending)
    content = idx_bytes(PIXELS)[:4] + struct.pack(">III", 60_000, 2000, 2000)
    path.write_bytes(gzip.compress(content) if ending else content)
    fails(lambda: load_shard(str(path)), "bytes, expected 240000000000, as its header says")


def test_an_npz_member_with_much_behind_its_array(tmp_path):
    source = with_x(tmp_path / "data.npz", MORE)
    fails(lambda: load_shard(source), "data.npz, x: got more than 1024 bytes, expected 1024")


@pytest.mark.parametrize("count", [2**20, 2**40, 2**62])
def test_an_npz_member_that_promises_much(tmp_path, count):
    source = with_x(tmp_path / "data.npz", npy_header((count, 1, 8, 8)) + bytes(1024))
    fails(lambda: load_shard(source), f"expected {256 * count}, as its header says")


def test_an_npz_whose_list_of_members_promises_much(tmp_path):
    """Its member holds 1 KB, and the archive says 256 MB, as the member does."""
    path = tmp_path / "data.npz"
    content = npy_header((2**20, 1, 8, 8)) + bytes(1024)
    with_x(path, content)
    size = struct.pack("<I", len(content))
    told = struct.pack("<I", 2**28 + 128)
    path.write_bytes(path.read_bytes().replace(size, told))
    with pytest.raises(DataError, match="data.npz"):
        load_shard(str(path))


def matlab(element: bytes) -> bytes:
    packed = zlib.compress(element)
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    return head + struct.pack("<II", 15, len(packed)) + packed


@pytest.mark.parametrize(
    ("element", "said"),
    [
        (struct.pack("<II", 14, 16) + ZEROS, "more than 16 bytes, expected 16"),
        (struct.pack("<II", 14, 2**31) + bytes(64), "expected 2147483648, as its header says"),
        (struct.pack("<II", 14, 100) + bytes(64), "64 bytes, expected 100"),
        (struct.pack("<II", 15, 20) + zlib.compress(bytes(99999))[:20], "within another"),
        (b"\x0e", "expected"),
    ],
)
def test_matlab_elements(tmp_path, element, said):
    for name in ("fall_data.mat", "fall_labels.mat"):
        (tmp_path / name).write_bytes(matlab(element))
    fails(lambda: load_shard(str(tmp_path / "fall_data.mat")), "fall_data.mat", said)


def test_what_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    """1,000 x 64 numbers of 4 bytes, and as many as float32: 0.49 MiB."""
    source = write_npz(
        tmp_path / "d.npz", x=np.zeros((1000, 1, 8, 8), np.float32), y=np.arange(1000)
    )
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\n")
    monkeypatch.setattr(bounded, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(bounded, "GROUP", tmp_path)
    assert bounded.free_bytes() == 500 * 1024
    assert len(load_shard(source)) == 1000, "500 KiB are enough"
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert bounded.free_bytes() == 100_000
    fails(lambda: load_shard(source), "d.npz, x: got 0 MiB of numbers", "take fewer")
    (tmp_path / "memory.max").write_text("max\n")
    assert bounded.free_bytes() == 500 * 1024, "a container without a limit"
    monkeypatch.setattr(bounded, "MEMINFO", tmp_path / "absent")
    assert bounded.free_bytes() == float("inf"), "another system"
