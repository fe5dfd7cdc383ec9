"""Folders of images by class: what is read, and what is refused by the name of its file."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest

from edge_sdk.data.loading import load, load_shard
from edge_sdk.errors import LackError
from edge_sdk.helpers import imports
from tests.support.data_files import fails
from tests.support.own_files import pixels, write_image, write_images

pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def test_pixels_labels_and_names(tmp_path, caplog):
    write_images(tmp_path)
    (tmp_path / "README.txt").write_text("not read")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"")
    name, examples, test = load(str(tmp_path))
    assert (name, test) == (tmp_path.name, None)
    assert (examples.class_names, examples.y.tolist()) == (("cat", "dog"), [0, 0, 1, 1])
    assert examples.input_shape == (3, 3, 4)
    wanted = np.stack([pixels(label, number) for label in range(2) for number in range(2)])
    np.testing.assert_allclose(examples.x, wanted.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert not caplog.records


def test_grey_images_and_many_formats(tmp_path):
    for number, ending in enumerate(("png", "PNG", "bmp", "pgm", "tif", "gif")):
        write_image(tmp_path / "a" / f"{number}.{ending}", pixels(0, number, channels=1))
    fails(lambda: load(str(tmp_path)), "5.gif", "RGB, expected 4 x 3 pixels, grey", "channels = 1")
    (tmp_path / "data.toml").write_text("channels = 1")
    examples = load_shard(str(tmp_path))
    assert examples.input_shape == (1, 3, 4)
    wanted = np.stack([pixels(0, number, channels=1) for number in range(6)])[:, None]
    np.testing.assert_allclose(examples.x, wanted / 127.5 - 1, atol=1e-6)


def test_unequal_sizes_are_refused_or_resized_as_asked(tmp_path):
    write_images(tmp_path)
    write_image(tmp_path / "dog" / "z.png", np.full((6, 6, 3), 51, np.uint8))
    step = "size = [3, 4] in data.toml"
    fails(lambda: load(str(tmp_path)), "z.png", "6 x 6 pixels, RGB", "4 x 3 pixels", step)
    (tmp_path / "data.toml").write_text("size = [2, 5]")
    examples = load_shard(str(tmp_path))
    assert examples.input_shape == (3, 2, 5)
    np.testing.assert_allclose(examples.x[-1], -0.6, atol=1e-6)  # 51 / 127.5 - 1


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    for name in "ab":
        write_image(tmp_path / name / "0.png", pixels(0, 0, channels=1), exif=exif)
    examples = load_shard(str(tmp_path))
    assert examples.input_shape == (1, 4, 3)
    turned = np.rot90(pixels(0, 0, channels=1), -1)
    np.testing.assert_allclose(examples.x[0, 0], turned / 127.5 - 1, atol=1e-6)


def test_transparent_images_need_a_word(tmp_path):
    values = np.full((3, 4, 4), 255, np.uint8)
    write_image(tmp_path / "a" / "0.png", values)
    assert load_shard(str(tmp_path)).x.min() == 1  # as nothing shows through
    values[0, 0, 3] = 0
    write_image(tmp_path / "a" / "0.png", values)
    fails(lambda: load(str(tmp_path)), "0.png", "transparent pixels", "laid on black")
    (tmp_path / "data.toml").write_text("channels = 3")
    x = load_shard(str(tmp_path)).x
    assert (x[0, :, 0, 0].tolist(), x[0, 0, 0, 1]) == ([-1, -1, -1], 1)


def bomb(side: int) -> bytes:
    """A PNG that says it is so large and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"", ("UnidentifiedImageError", "copy it again")),
        (b"not an image", ("UnidentifiedImageError",)),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ("UnidentifiedImageError",)),
        (bomb(8000), ("8000 x 8000 pixels", "at most 50,000,000 in all")),
        (bomb(60_000), ("DecompressionBombError",)),
        (bomb(10), ("OSError", "truncated")),
    ],
    ids=["empty", "text", "program", "large", "bomb", "cut"],
)
def test_broken_files_are_named(tmp_path, content, fragments):
    write_images(tmp_path)
    (tmp_path / "dog" / "1.png").write_bytes(content)
    fails(lambda: load(str(tmp_path)), str(tmp_path / "dog" / "1.png"), *fragments)


def test_16_bits_and_moving_pictures_are_refused(tmp_path):
    from PIL import Image

    path = write_image(tmp_path / "a" / "0.png", np.full((3, 4), 300, np.uint16))
    fails(lambda: load(str(tmp_path)), str(path), "pixels of mode I", "of 8 bits")
    path.unlink()
    frames = [Image.fromarray(pixels(0, number, channels=1)) for number in range(3)]
    frames[0].save(tmp_path / "a" / "1.gif", save_all=True, append_images=frames[1:])
    fails(lambda: load(str(tmp_path)), "1.gif", "3 frames, expected one image")


def test_classes_that_lack_are_told_and_named_ones_hold(tmp_path, caplog):
    write_images(tmp_path)
    (tmp_path / "bird").mkdir()
    examples = load_shard(str(tmp_path))
    assert (examples.class_names, examples.y.tolist()) == (("bird", "cat", "dog"), [1, 1, 2, 2])
    assert "no .png" in caplog.text
    assert "this device has none of that class" in caplog.text
    (tmp_path / "bird").rmdir()
    (tmp_path / "data.toml").write_text('classes = ["dog", "bird", "cat"]')
    assert load_shard(str(tmp_path)).y.tolist() == [2, 2, 0, 0]
    (tmp_path / "data.toml").write_text('classes = ["dog", "bird"]')
    fails(lambda: load(str(tmp_path)), "the folder 'cat'", "a name of classes")


def test_what_lies_elsewhere_than_in_a_class_is_told_or_refused(tmp_path, caplog):
    write_images(tmp_path)
    write_image(tmp_path / "cover.png", pixels(0, 0))
    (tmp_path / "dog" / "notes\nhere.doc").write_text("")
    load_shard(str(tmp_path))
    assert "['cover.png'] lie in no folder of a class" in caplog.text
    assert r"['notes\nhere.doc'] are not read" in caplog.text
    (tmp_path / "dog" / "puppies").mkdir()
    fails(lambda: load(str(tmp_path)), "puppies", "a folder within that of a class")


def test_names_of_files_and_classes_break_no_line(tmp_path):
    write_images(tmp_path)
    (tmp_path / "dog" / "a\nb.png").write_bytes(b"x")
    fails(lambda: load(str(tmp_path)), r"a\nb.png", "UnidentifiedImageError")
    (tmp_path / "dog" / "a\nb.png").unlink()
    write_image(tmp_path / "x\ny" / "0.png", pixels(0, 0))
    fails(lambda: load(str(tmp_path)), r"class_names with 'x\ny'")
    (tmp_path / "x\ny").rename(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    fails(lambda: load(str(tmp_path)), r"class_names with '\udcff'")


def test_links_stay_within_the_folder(tmp_path):
    inside, outside = tmp_path / "all", tmp_path / "other" / "0.png"
    write_images(inside)
    write_image(outside, pixels(1, 1))
    (inside / "dog" / "a.png").symlink_to(inside / "dog" / "0.png")
    assert len(load_shard(str(inside))) == 5
    for link, target in (("dog/b.png", outside), ("emu", outside.parent)):
        (inside / link).symlink_to(target)
        fails(lambda: load(str(inside)), link, "leads out of", "copy it there")
        (inside / link).unlink()
    (inside / "dog" / "c.png").symlink_to("nothing")
    fails(lambda: load(str(inside)), "c.png", "a link to nothing")
    (inside / "dog" / "c.png").unlink()
    os.mkfifo(inside / "dog" / "d.png")
    fails(lambda: load(str(inside)), "d.png", "no regular file")


def test_folders_that_are_no_classes(tmp_path):
    (tmp_path / "a").mkdir()
    fails(lambda: load(str(tmp_path)), "a directory without data files", ".png (images)")
    write_images(tmp_path / "set" / "train")
    (tmp_path / "set" / "val").mkdir()
    (tmp_path / "set" / "test").mkdir()
    fails(lambda: load(str(tmp_path / "set")), "test: got no folders in it", "as in train")
    write_images(tmp_path / "set" / "test")
    (tmp_path / "set" / "test" / "dog").rename(tmp_path / "set" / "test" / "emu")
    fails(lambda: load(str(tmp_path / "set")), "other class_names in test than in train")
    (tmp_path / "set" / "data.toml").write_text('classes = ["emu", "dog", "cat"]')
    _, train, test = load(str(tmp_path / "set"))
    assert test is not None
    assert (train.y.tolist(), test.y.tolist()) == ([2, 2, 1, 1], [2, 2, 0, 0])


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    write_images(tmp_path)

    def lacks(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(imports.importlib, "import_module", lacks)
    fails(
        lambda: load(str(tmp_path)),
        "PIL.Image, which is not installed",
        "[images]",
        error=LackError,
    )
