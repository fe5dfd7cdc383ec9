"""Writers of small files in the formats of published data sets: SVHN, STL-10, CIFAR.

Every pixel is told apart by its place, so a reader that swaps axes fails.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import savemat

LABELS = np.array([3, 10, 1, 9], dtype=np.uint8)  # as SVHN and STL-10 count, from 1


def pixels(n: int, side: int, shift: int = 0) -> np.ndarray:
    """(n, 3, side, side) uint8: 100 i + 50 c + 2 row + 7 column, modulo 256."""
    i, c, row, column = np.indices((n, 3, side, side))
    return ((100 * i + 50 * c + 2 * row + 7 * column + shift) % 256).astype(np.uint8)


def unscaled(x: np.ndarray) -> np.ndarray:
    """Pixels from -1..1 back to 0..255, which must come out whole."""
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    whole = np.rint((x.astype(np.float64) + 1) * 127.5)
    np.testing.assert_allclose(x, whole / 127.5 - 1, atol=1e-6)
    return whole.astype(np.uint8)


def write_svhn(path: Path, n: int = 4, shift: int = 0, compressed: bool = True, **changes) -> Path:
    x = pixels(n, 32, shift).transpose(2, 3, 1, 0)  # (n, c, row, column) -> (row, column, c, n)
    content = {"X": x, "y": LABELS[:n, None], **changes}
    content = {name: array for name, array in content.items() if array is not None}
    savemat(path, content, do_compression=compressed)
    return path


def write_stl(folder: Path, part: str, n: int = 4, shift: int = 0) -> Path:
    path = folder / f"{part}_X.bin"
    path.write_bytes(pixels(n, 96, shift).transpose(0, 1, 3, 2).tobytes())  # columns first
    (folder / f"{part}_y.bin").write_bytes(LABELS[:n].tobytes())
    return path


def records(labels: list[list[int]], shift: int = 0) -> bytes:
    """CIFAR's binary version: the labels of an image, then its planes."""
    images = pixels(len(labels), 32, shift)
    pairs = zip(labels, images, strict=True)
    return b"".join(bytes(label) + image.tobytes() for label, image in pairs)


def write_cifar_10(folder: Path) -> Path:
    """Five batches of one image with labels 5..9, and a test batch of two."""
    for number in range(1, 6):
        path = folder / f"data_batch_{number}.bin"
        path.write_bytes(records([[4 + number]], shift=number))
    (folder / "test_batch.bin").write_bytes(records([[0], [9]]))
    return folder / "data_batch_1.bin"


def write_cifar_100(folder: Path) -> Path:
    (folder / "train.bin").write_bytes(records([[19, 99], [0, 4], [7, 42]]))
    (folder / "test.bin").write_bytes(records([[1, 17]], shift=5))
    return folder / "train.bin"


class Pickled:
    """Bytes as Python 2's cPickle writes them in protocol 2, opcode by opcode."""

    def __init__(self) -> None:
        self.parts = [b"\x80\x02"]
        self.num_memos = 0

    def put(self, raw: bytes) -> Pickled:
        self.parts.append(raw)
        return self

    @property
    def raw(self) -> bytes:
        return b"".join(self.parts)

    def memo(self) -> Pickled:
        self.num_memos += 1  # cPickle counts from 1
        key = self.num_memos
        return self.put(b"q%c" % key if key < 256 else b"r" + key.to_bytes(4, "little"))

    def text(self, value: bytes) -> Pickled:
        size = len(value)
        head = b"U%c" % size if size < 256 else b"T" + size.to_bytes(4, "little")
        return self.put(head + value).memo()

    def number(self, value: int) -> Pickled:
        return self.put(b"K%c" % value if value < 256 else b"M" + value.to_bytes(2, "little"))

    def sequence(self, values: list[bytes] | list[int]) -> Pickled:
        self.put(b"]").memo()
        for start in range(0, len(values), 1000):
            part = values[start : start + 1000]
            self.put(b"(" if len(part) > 1 else b"")
            for value in part:
                self.text(value) if isinstance(value, bytes) else self.number(value)
            self.put(b"e" if len(part) > 1 else b"a")
        return self

    def array(self, array: np.ndarray, dtype: bytes = b"u1", fortran: bool = False) -> Pickled:
        self.put(b"cnumpy.core.multiarray\n_reconstruct\n").memo()
        self.put(b"cnumpy\nndarray\n").memo().put(b"K\x00\x85").memo().text(b"b").put(b"\x87")
        self.memo().put(b"R").memo().put(b"(K\x01")
        for size in array.shape:
            self.number(size)
        self.put(b"\x86" if array.ndim == 2 else b"\x85").memo()
        self.put(b"cnumpy\ndtype\n").memo().text(dtype).put(b"K\x00K\x01\x87").memo().put(b"R")
        self.memo().put(b"(K\x03").text(b"|").put(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t")
        self.memo().put(b"b" + (b"\x88" if fortran else b"\x89"))
        return self.text(array.tobytes("F" if fortran else "C")).put(b"t").memo().put(b"b")


def cifar_pickle(images: np.ndarray, labels: list[int], key: bytes = b"labels", **how) -> bytes:
    made = Pickled().put(b"}").memo().put(b"(")
    made.text(b"batch_label").text(b"training batch 1 of 5").text(key).sequence(labels)
    made.text(b"data").array(images.reshape(len(images), -1), **how)
    made.text(b"filenames").sequence([b"image_%d.png" % i for i in range(len(images))])
    return made.put(b"u.").raw


def write_cifar_10_python(folder: Path) -> Path:
    for number in range(1, 6):
        content = cifar_pickle(pixels(1, 32, number), [4 + number])
        (folder / f"data_batch_{number}").write_bytes(content)
    (folder / "test_batch").write_bytes(cifar_pickle(pixels(2, 32), [0, 9]))
    return folder / "data_batch_1"


def write_cifar_100_python(folder: Path) -> Path:
    content = cifar_pickle(pixels(3, 32), [99, 4, 42], b"fine_labels")
    (folder / "train").write_bytes(content)
    (folder / "test").write_bytes(cifar_pickle(pixels(1, 32, 5), [17], b"fine_labels"))
    return folder / "train"
