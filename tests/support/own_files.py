"""Small files of the kinds that people have: tables, and a folder for each class."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

TABLE = "size,weight,label\n1,0.5,cat\n2,-0.5,dog\n3,1e-1,cat\n"


def write_csv(path: Path, text: str | bytes = TABLE, about: str = "") -> Path:
    """about: the data.toml beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if about:
        (path.parent / "data.toml").write_text(about)
    return path


def pixels(label: int, number: int, height: int = 3, width: int = 4, channels: int = 3):
    """(height, width, channels) that differ at every place, up to 255."""
    values = np.arange(height * width * channels) * 7 + 50 * label + 20 * number
    shape = (height, width) if channels == 1 else (height, width, channels)
    return (values % 256).reshape(shape).astype(np.uint8)


def write_image(path: Path, values: np.ndarray, mode: str | None = None, **options) -> Path:
    image_of = pytest.importorskip("PIL.Image", reason="Pillow is not installed").fromarray
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image_of(values)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def write_images(folder: Path) -> Path:
    """Two cats and two dogs, RGB, 3 x 4; the path of the first."""
    for label, name in enumerate(("cat", "dog")):
        for number in range(2):
            write_image(folder / name / f"{number}.png", pixels(label, number))
    return folder / "cat" / "0.png"


def write_sound(path: Path, values: np.ndarray, rate: int = 8000, width: int = 2) -> Path:
    """values: (samples, channels) or (samples,), -1 to below 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = values if values.ndim == 2 else values[:, None]
    if width == 1:
        raw = (values * 128 + 128).astype(np.uint8).tobytes()
    else:
        whole = np.ascontiguousarray((values * 2.0**31).astype("<i4")).view(np.uint8)
        raw = whole.reshape(-1, 4)[:, 4 - width :].tobytes()  # the upper bytes
    with wave.open(str(path), "wb") as file:
        file.setparams((values.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(raw)
    return path


def write_sounds(folder: Path) -> Path:
    """Two cats and two dogs, mono, 8 samples; the path of the first."""
    for label, name in enumerate(("cat", "dog")):
        for number in range(2):
            write_sound(
                folder / name / f"{number}.wav", np.linspace(-1, 0.25 * label, 8) + number / 4
            )
    return folder / "cat" / "0.wav"


WORDS = ("[PAD]", "[UNK]", "the", "cat", "dog", "sat", "ran", ".")


def write_tokenizer(path: Path, words=WORDS, padding: bool = False) -> Path:
    """A word is a token, its id its place in `words`."""
    package = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    vocabulary = {word: number for number, word in enumerate(words)}
    made = package.Tokenizer(package.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = package.pre_tokenizers.Whitespace()
    if padding:
        made.enable_padding(pad_id=0, pad_token="[PAD]")
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(path))
    return path


def write_text(path: Path, text: str, about: str = "", length: int = 4) -> Path:
    """The text with a tokenizer and a data.toml beside it."""
    write_tokenizer(path.parent / "tokenizer.json")
    path.write_text(text)
    keys = f'tokenizer = "tokenizer.json"\nlength = {length}\n'
    (path.parent / "data.toml").write_text(keys + about)
    return path


def write_jsonl(path: Path) -> Path:
    lines = ('{"text": "the cat sat", "label": "cat"}', '{"text": "the dog ran", "label": "dog"}')
    return write_text(path, "\n".join((*lines, *lines)), 'pad = "[PAD]"')


def write_texts(folder: Path) -> Path:
    """Two cats and two dogs; the path of the first."""
    for name in ("cat", "dog"):
        for number in range(2):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{number}.txt").write_text(f"the {name} sat" + " ." * number)
    write_tokenizer(folder / "tokenizer.json", padding=True)
    (folder / "data.toml").write_text('tokenizer = "tokenizer.json"\nlength = 4\n')
    return folder / "cat" / "0.txt"
