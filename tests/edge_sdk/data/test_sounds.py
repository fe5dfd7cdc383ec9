"""Folders of WAV files by class."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.data.contract import mismatch
from edge_sdk.data.loading import load, load_shard
from tests.support.data_files import fails
from tests.support.own_files import write_image, write_sound, write_sounds

STEPS = np.array([-1, -0.5, 0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width_mean_the_same(tmp_path, width):
    write_sound(tmp_path / "a" / "0.wav", STEPS, width=width)
    write_sound(tmp_path / "b" / "0.WAV", -STEPS[::-1] / 2, width=width)
    name, examples, test = load(str(tmp_path))
    assert (name, test, examples.class_names) == (tmp_path.name, None, ("a", "b"))
    np.testing.assert_array_equal(examples.x, np.stack([STEPS, -STEPS[::-1] / 2])[:, None])
    assert (examples.y.tolist(), examples.scaling) == ([0, 1], None)
    assert examples.made_of == "sound of 8000 Hz"


def test_stereo_is_two_channels_or_their_mean(tmp_path):
    stereo = np.stack([STEPS, np.zeros(6)], axis=1)
    write_sound(tmp_path / "a" / "0.wav", stereo)
    np.testing.assert_array_equal(load_shard(str(tmp_path)).x, stereo.T[None])
    write_sound(tmp_path / "a" / "1.wav", STEPS)
    fails(lambda: load(str(tmp_path)), "1.wav", "8000 Hz, 1 channel,", "8000 Hz, 2 channels", "= 1")
    (tmp_path / "data.toml").write_text("channels = 1")
    np.testing.assert_array_equal(load_shard(str(tmp_path)).x, [[STEPS / 2], [STEPS]])


def test_other_lengths_are_refused_or_cut_and_filled(tmp_path, caplog):
    write_sound(tmp_path / "a" / "0.wav", STEPS)
    write_sound(tmp_path / "a" / "1.wav", STEPS[:2])
    fails(lambda: load(str(tmp_path)), "1.wav", "2 samples", "6, as 0.wav", "seconds = 0.00075")
    (tmp_path / "data.toml").write_text("seconds = 0.0005")  # 4 samples at 8000 Hz
    x = load_shard(str(tmp_path)).x
    np.testing.assert_array_equal(x, [[STEPS[:4]], [[-1, -0.5, 0, 0]]])
    assert "of 2 files 1 are cut off at 0.0005 s and 1 end in silence" in caplog.text


def test_other_rates_are_refused_here_and_on_other_devices(tmp_path):
    write_sound(tmp_path / "a" / "0.wav", STEPS)
    write_sound(tmp_path / "b" / "0.wav", STEPS, rate=16000)
    fails(lambda: load(str(tmp_path)), "16000 Hz, 1 channel", "8000 Hz, 1 channel, as 0.wav")
    told = []
    for rate in (16000, 8000):
        write_sound(tmp_path / "all" / "a" / "0.wav", STEPS, rate=rate)
        told.append(load_shard(str(tmp_path / "all")).input_scaling)
    assert mismatch(told[0], told[0], ("this run", "pi-1")) is None
    found = mismatch(told[0], told[1], ("this run", "pi-1"))
    assert found is not None
    assert found.is_certain
    assert "this run are sound of 16000 Hz, those of pi-1 sound of 8000 Hz" in found.text


def test_broken_files_are_named(tmp_path):
    path = write_sounds(tmp_path)
    raw = path.read_bytes()
    header = raw[:20] + b"\x03\x00" + raw[22:]  # of floats
    for content, fragment in (
        (raw[:-3], "16 in all by its header, 57 in the file"),
        (raw[:20], "EOFError"),
        (b"", "EOFError"),
        (b"RIFX" + raw[4:], "RIFF"),
        (header, "unknown format: 3"),
        (raw[:40] + b"\xff\xff\xff\x7f" + raw[44:], "2147483646 in all by its header"),
        (raw[:40] + bytes(4), "0 in all by its header"),
    ):
        path.write_bytes(content)
        fails(lambda: load(str(tmp_path)), str(path), fragment, "PCM")


def test_images_and_sounds_are_not_one_kind(tmp_path):
    write_sounds(tmp_path)
    write_image(tmp_path / "dog" / "0.png", np.zeros((2, 2), np.uint8))
    fails(lambda: load(str(tmp_path)), ".png and .wav", "one kind")
