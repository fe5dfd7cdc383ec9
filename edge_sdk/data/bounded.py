"""Content of files that is packed, or says how large it is: never more of it is unpacked than its
header says, and nothing that memory cannot hold. A few MB of zeros unpack to GB."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edge_sdk.data.examples import bad

MEMINFO, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
DAMAGED = "the file is cut off or damaged, copy it again"
FLOAT_BYTES = 4  # of a number once it is float32, as what trains
FORMATS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def check_fits(where: str | Path, count: int, item_bytes: int) -> None:
    """Raise DataError unless so many numbers fit into the memory that is free, as they lie in the
    file and as float32."""
    needed, free = count * (item_bytes + FLOAT_BYTES), free_bytes()
    if needed > free:
        got = f"{needed / 1024**2:.0f} MiB of numbers, as its header says"
        raise bad(where, got, f"at most {free / 1024**2:.0f} MiB, which are free", "take fewer")


def free_bytes() -> float:
    """Memory that is free here, within a container's limit; infinite where nothing tells."""
    free = math.inf
    try:
        lines = MEMINFO.read_text().splitlines()
        free = min(1024 * float(ln.split()[1]) for ln in lines if ln.startswith("MemAvailable:"))
        most, used = (float((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, most - used)
    except (OSError, ValueError):  # another system; no container; its limit is "max"
        pass
    return free


def read_exactly(stream: IO[bytes], num_bytes: int, where: str | Path) -> bytearray:
    """The rest of a stream, which is to have so many bytes. Raises DataError."""
    content = bytearray(num_bytes)
    view, at = memoryview(content), 0
    while at < num_bytes and (part := stream.read(min(num_bytes - at, 1 << 20))):
        view[at : at + len(part)] = part
        at += len(part)
    more = bool(stream.read(1))
    if at < num_bytes or more:
        got = f"{'more than ' if more else ''}{at} bytes"
        raise bad(where, got, f"{num_bytes}, as its header says", DAMAGED)
    return content


def read_array(stream: IO[bytes], where: str | Path, held_bytes: int) -> npt.NDArray[Any]:
    """An .npy file's array; nothing is ever unpickled. held_bytes: of the whole of it, as its
    folder or archive says. Raises DataError, and ValueError for what is no .npy file."""
    version = np.lib.format.read_magic(stream)
    if version not in FORMATS:
        raise ValueError(f".npy version {version}")
    shape, is_fortran, dtype = FORMATS[version](stream)
    if dtype.hasobject:
        raise ValueError("Python objects, which are never unpickled")
    count = math.prod(shape)
    num_bytes = count * dtype.itemsize
    if num_bytes > held_bytes:
        got = f"shape {shape} of {dtype}, {num_bytes} bytes"
        raise bad(where, got, f"at most the {held_bytes} that it holds", "copy the file again")
    check_fits(where, count, dtype.itemsize)
    flat = np.frombuffer(read_exactly(stream, num_bytes, where), dtype)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def inflate(packed: memoryview, where: str | Path) -> bytes:
    """A compressed element of a MATLAB 5 file: type and size, 4 bytes each, then so many more.
    Raises DataError, and zlib.error."""
    stream = zlib.decompressobj()
    head = stream.decompress(packed, 8)
    num_bytes = int.from_bytes(head[4:8], "little")
    check_fits(where, num_bytes, 0)
    body = stream.decompress(stream.unconsumed_tail, num_bytes + 1)
    if len(body) != num_bytes:
        got = f"{'more than ' if len(body) > num_bytes else ''}{min(len(body), num_bytes)} bytes"
        raise bad(where, got, f"{num_bytes}, as its header says", DAMAGED)
    return head + body
