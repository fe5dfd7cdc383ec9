"""Images in a folder for each class, by Pillow (extra `images`).

Only formats that Pillow decodes by itself or by a codec library are opened: some of its others
start programs. What an image says of its size is looked at before it is decoded, as a few KB may
unpack to GB."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edge_sdk.data.bounded import check_free
from edge_sdk.data.examples import Examples, bad, mapped
from edge_sdk.data.readers.class_folders import class_files
from edge_sdk.data.readers.description import Description, described_by
from edge_sdk.data.readers.scaling import image_examples
from edge_sdk.data.readers.table import FileSet, register_reader
from edge_sdk.helpers.imports import optional_module

Pixels: TypeAlias = npt.NDArray[np.uint8]
Side: TypeAlias = Annotated[int, Meta(ge=1, le=8192)]
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm"),
)
MOST_PIXELS = 50_000_000  # of an image as it lies in its file
BY_CHANNELS = {1: "L", 3: "RGB"}  # Pillow's names
CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3, "CMYK": 3, "YCbCr": 3, "LAB": 3, "HSV": 3}
EXPECTED = "an image that Pillow can read"
BROKEN = "copy it again, or remove it"


class Images(Description, frozen=True, kw_only=True):
    """size: (H, W) that all images are resized to, bilinearly and without keeping their
    proportions. channels: 1, all become grey, or 3, RGB; what is transparent is laid on black.
    None: as the images are, if they are all alike."""

    size: tuple[Side, Side] | None = None
    channels: Literal[1, 3] | None = None


def read_images(paths: Sequence[Path]) -> Examples:
    """Examples (n, C, H, W) of the one folder, scaled as pixels. Raises DataError, and ConfigError
    without Pillow."""
    (root,) = paths
    pillow = optional_module("PIL.Image", "a folder of images", "images")
    operations = optional_module("PIL.ImageOps", "a folder of images", "images")
    with mapped(root, "folders of images"):
        wanted = described_by(root, Images)
        found = class_files(root, ENDINGS, wanted.classes)
        first = _pixels(pillow, operations, found.files[0][0], wanted)
        check_free(root, 5 * first.size * len(found.files), f"{len(found.files)} images")  # bytes
        x = np.empty((len(found.files), *first.shape), np.uint8)
        for place, (path, _) in enumerate(found.files):
            pixels = _pixels(pillow, operations, path, wanted)
            if pixels.shape != first.shape:
                raise _unlike(path, pixels, found.files[0][0], first)
            x[place] = pixels
    y = np.array([label for _, label in found.files])
    examples = image_examples(x, y, len(found.class_names), str(root))
    return replace(examples, class_names=found.class_names)


def _pixels(pillow: Any, operations: Any, path: Path, wanted: Images) -> Pixels:
    """(C, H, W), turned as its EXIF data say."""
    with mapped(path, EXPECTED, BROKEN), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own doubts, of its size above all
        with pillow.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                got, most = f"{width} x {height} pixels", f"at most {MOST_PIXELS:,} in all"
                raise bad(path, got, most, "make it smaller, or remove it")
            if getattr(image, "is_animated", False):
                raise bad(
                    path, f"{image.n_frames} frames", "one image", "remove it, or all but one"
                )
            turned = _as_channels(operations.exif_transpose(image), path, wanted.channels)
        if wanted.size:
            turned = turned.resize(wanted.size[::-1], pillow.Resampling.BILINEAR)
        pixels = np.asarray(turned, np.uint8)  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _as_channels(image: Any, path: Path, channels: int | None) -> Any:
    """Grey or RGB."""
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        if whole.getextrema()[3][0] < 255:
            if channels is None:
                step = "write channels = 3 in data.toml: it is then laid on black"
                raise bad(path, "transparent pixels", "none", step)
            black = whole.copy()
            black.paste((0, 0, 0, 255), (0, 0, *whole.size))
            black.alpha_composite(whole)
            whole = black
        image = whole.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if image.mode not in CHANNELS:
        step = "convert it to 8 bits by the same constants on every device"
        raise bad(path, f"pixels of mode {image.mode}", "grey or colours of 8 bits", step)
    return image.convert(BY_CHANNELS[channels or CHANNELS[image.mode]])


def _unlike(path: Path, pixels: Pixels, first_path: Path, first: Pixels) -> Exception:
    got, wanted = (f"{p.shape[2]} x {p.shape[1]} pixels, {_kind(p)}" for p in (pixels, first))
    keys = {
        f"size = [{first.shape[1]}, {first.shape[2]}]": pixels.shape[1:] != first.shape[1:],
        f"channels = {first.shape[0]}": pixels.shape[0] != first.shape[0],
    }
    lines = " and ".join(key for key, is_other in keys.items() if is_other)
    step = f"make all alike, or write {lines} in data.toml, which makes all so"
    return bad(path, got, f"{wanted}, as {first_path.parent.name}/{first_path.name}", step)


def _kind(pixels: Pixels) -> str:
    return "grey" if len(pixels) == 1 else "RGB"


register_reader(
    FileSet(
        name="images",
        read=read_images,
        by_class=ENDINGS,
        title=lambda path: path.resolve().name,
    )
)
