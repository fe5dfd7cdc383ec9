"""Sound in a folder for each class: WAV files of PCM, by the standard library's wave.

Integers of any width become -1..1 by their own largest number, so that recordings of 16 and of 24
bits mean the same; the rate is told with the data, as no shape shows it."""

from __future__ import annotations

import logging
import os
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from edge_sdk.data.bounded import DAMAGED, FLOAT_BYTES, check_free
from edge_sdk.data.examples import Examples, Floats, bad, check_examples, mapped
from edge_sdk.data.readers.class_folders import class_files
from edge_sdk.data.readers.description import NAME, Description, described_by
from edge_sdk.data.readers.scaling import scaled
from edge_sdk.data.readers.table import FileSet, register_reader

log = logging.getLogger(__name__)
ENDINGS = (".wav", ".wave")
EXPECTED = "a WAV file of PCM, 8, 16, 24 or 32 bits"
CONVERT = "convert it, e.g. ffmpeg -i FILE -c:a pcm_s16le NEW.wav"


class Sounds(Description, frozen=True, kw_only=True):
    """seconds: of an example; longer files are cut off, shorter ones end in silence. None: as they
    are, if all are equally long. channels: 1, the mean of all; None: as they are."""

    seconds: Annotated[float, Meta(gt=0, le=3600)] | None = None
    channels: Literal[1] | None = None


@dataclass(frozen=True)
class _Form:
    """What all files of a folder share: samples a second and channels."""

    rate: int
    channels: int

    def __str__(self) -> str:
        return f"{self.rate} Hz, {self.channels} channel{'s' * (self.channels > 1)}"


def read_sounds(paths: Sequence[Path]) -> Examples:
    """Examples (n, C, window) of the one folder, -1..1. Raises DataError."""
    (root,) = paths
    with mapped(root, "folders of WAV files"):
        wanted = described_by(root, Sounds)
        found = class_files(root, ENDINGS, wanted.classes)
        first_path = found.files[0][0]
        form, first = _sound(first_path, wanted)
        window = round(wanted.seconds * form.rate) if wanted.seconds else first.shape[1]
        count = len(found.files)
        check_free(root, FLOAT_BYTES * count * len(first) * window, f"{count} sounds")
        x = np.zeros((count, len(first), max(1, window)), np.float32)
        num_cut = num_filled = 0
        for place, (path, _) in enumerate(found.files):
            own, sound = _sound(path, wanted)
            if own != form:
                step = f"convert it, or for the mean of all channels write channels = 1 in {NAME}"
                raise bad(path, str(own), f"{form}, as {first_path.name}", step)
            length = sound.shape[1]
            if length != window and not wanted.seconds:
                step = f"write seconds = {window / form.rate:g} in {NAME}, which cuts or fills them"
                raise bad(path, f"{length} samples", f"{window}, as {first_path.name}", step)
            num_cut, num_filled = num_cut + (length > window), num_filled + (length < window)
            x[place, :, : min(length, window)] = sound[:, :window]
    if num_cut or num_filled:
        said = "%s: of %d files %d are cut off at %g s and %d end in silence"
        log.warning(said, root, count, num_cut, wanted.seconds, num_filled)
    y = np.array([label for _, label in found.files], np.int64)
    examples = Examples(
        x,
        y,
        len(found.class_names),
        class_names=found.class_names,
        made_of=f"sound of {form.rate} Hz",
    )
    return check_examples(examples, str(root))


def _sound(path: Path, wanted: Sounds) -> tuple[_Form, Floats]:
    """(C, samples) of a file, which is all there."""
    with mapped(path, EXPECTED, CONVERT), path.open("rb") as file, wave.open(file) as sound:
        width, channels = sound.getsampwidth(), sound.getnchannels()
        num_bytes = sound.getnframes() * width * channels
        size = os.fstat(file.fileno()).st_size
        raw = sound.readframes(sound.getnframes()) if num_bytes <= size else b""
        if not 1 <= width <= 4 or not raw or len(raw) != num_bytes:
            got = f"{width} bytes a sample, {num_bytes} in all by its header, {size} in the file"
            raise bad(path, got, f"{EXPECTED}, with at least one sample", DAMAGED)
        form = _Form(sound.getframerate(), wanted.channels or channels)
    values = _samples(raw, width).reshape(-1, channels).T  # (samples, C) -> (C, samples)
    if wanted.channels:
        values = values.mean(0, np.float32, keepdims=True)
    return form, values


def _samples(raw: bytes, width: int) -> Floats:
    """PCM of so many bytes a sample, little endian; one byte is unsigned."""
    if width == 1:
        return scaled(np.frombuffer(raw, np.uint8), 128, 1)
    whole = np.zeros((len(raw) // width, 4), np.uint8)  # the upper bytes of 32 bits
    whole[:, 4 - width :] = np.frombuffer(raw, np.uint8).reshape(-1, width)
    values: Floats = whole.view("<i4")[:, 0].astype(np.float32)
    values /= np.float32(2**31)
    return values


register_reader(
    FileSet(
        name="sounds",
        read=read_sounds,
        by_class=ENDINGS,
        title=lambda path: path.resolve().name,
    )
)
