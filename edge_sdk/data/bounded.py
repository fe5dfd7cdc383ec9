"""Content of files that is packed, or says how large it is: never more of it is unpacked than its
header says, and nothing that memory cannot hold. A few MB of zeros unpack to GB."""

from __future__ import annotations

import logging
import math
import zipfile
import zlib
from collections.abc import Collection, Iterable
from gzip import GzipFile
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_sdk.data.contract import bad

log = logging.getLogger(__name__)
Stream: TypeAlias = IO[bytes] | GzipFile
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
MEMINFO, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
DAMAGED = "the file is cut off or damaged, copy it again"
PART_BYTES = 1024**2
MOST_PACKED = 1032  # bytes that deflate makes of one, at most
FLOAT_BYTES = 4  # of a number once it is float32, as what trains
FORMATS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def check_fits(where: str | Path, count: int, item_bytes: int, held_bytes: int) -> None:
    """Raise DataError unless so many numbers can be in a file that holds so many bytes, and fit
    into the memory that is free, as they lie in the file and as float32."""
    if count * item_bytes > held_bytes:
        got = f"{held_bytes} bytes"
        raise bad(where, got, f"{count * item_bytes}, as its header says", DAMAGED)
    check_free(where, count * (item_bytes + FLOAT_BYTES), "numbers, as its header says")


def check_free(where: str | Path, num_bytes: int, what: str) -> None:
    """Raise DataError unless so much memory is free."""
    if num_bytes > (free := free_bytes()):
        got = f"{num_bytes / 1024**2:.0f} MiB of {what}"
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


def read_exactly(stream: Stream, num_bytes: int, where: str | Path) -> bytearray:
    """The rest of a stream, which is to have so many bytes. Raises DataError."""
    content = bytearray()  # grows as content comes: a header may promise more
    while part := stream.read(min(num_bytes - len(content), PART_BYTES)):
        content += part
    more = len(content) == num_bytes and stream.read(1)
    if len(content) < num_bytes or more:
        got = f"{'more than ' if more else ''}{len(content)} bytes"
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
        step = "save numbers, or text as np.array(..., dtype=str)"
        raise bad(where, "Python objects", "an array", step)
    count = math.prod(shape)
    check_fits(where, count, dtype.itemsize, held_bytes)
    flat = np.frombuffer(read_exactly(stream, count * dtype.itemsize, where), dtype)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def read_arrays(
    file: IO[bytes], where: str | Path, names: Collection[str], needed: Collection[str]
) -> Arrays:
    """Those of these arrays that an .npz file holds; others are told of, as a name may be misspelt.
    Raises DataError, also without those that are needed, and zipfile.BadZipFile."""
    with zipfile.ZipFile(file) as archive:
        held = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if not held.keys() >= set(needed):
            got, wanted = f"arrays {shown(held)}", f"arrays {' and '.join(needed)}"
            step = f"save them under these names: np.savez(PATH, {', '.join(map(_as, needed))})"
            raise bad(where, got, wanted, step)
        if other := held.keys() - set(names):
            known = ", ".join(names)
            log.warning("%s: arrays %s are not read; known: %s", where, shown(other), known)
        found = {}
        for name in held.keys() & set(names):
            with archive.open(held[name]) as stream:
                found[name] = read_array(stream, f"{where}, {name}", held[name].file_size)
        return found


def _as(name: str) -> str:
    return f"{name}=..."


def shown(names: Iterable[str], most: int = 8) -> str:
    """Names that may be anything, in order."""
    found = sorted(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"[{', '.join(f'{name!r:.40}' for name in found[:most])}]{more}"


def inflate(packed: memoryview, where: str | Path) -> bytes:
    """A compressed element of a MATLAB 5 file: type and size, 4 bytes each, then so many more.
    Raises DataError, and zlib.error."""
    stream = zlib.decompressobj()
    head = stream.decompress(packed, 8)
    num_bytes = int.from_bytes(head[4:8], "little")
    check_fits(where, num_bytes, 1, MOST_PACKED * len(packed))
    body = stream.decompress(stream.unconsumed_tail, num_bytes + 1)
    if len(body) != num_bytes:
        got = f"{'more than ' if len(body) > num_bytes else ''}{min(len(body), num_bytes)} bytes"
        raise bad(where, got, f"{num_bytes}, as its header says", DAMAGED)
    return head + body
