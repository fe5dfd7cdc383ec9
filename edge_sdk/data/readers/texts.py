"""Texts as token ids, by a tokenizer file of the user's (extra `text`): one text or one JSON object
a line of which the next token is learned, and texts with a label.

Every example has `length` ids, as models are built for one shape; what a text lacks is padding."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TextIO

import numpy as np
from msgspec import Meta

from edge_sdk.data.bounded import check_free, shown
from edge_sdk.data.examples import Examples, Ints, bad, check_examples, mapped
from edge_sdk.data.readers.class_folders import class_files
from edge_sdk.data.readers.description import NAME, Description, described_by, folder_of
from edge_sdk.data.readers.labels import Words, class_labels, num_classes
from edge_sdk.data.readers.lines import MOST_LINE, check_memory, lines_of, opened
from edge_sdk.data.readers.table import FileSet, register_reader
from edge_sdk.helpers.imports import optional_module
from edge_sdk.tasks.tokens import IGNORED

log = logging.getLogger(__name__)
ENDINGS = (".txt",)
EXPECTED = "text in UTF-8"
OBJECT = '{"text": "..."}, perhaps with a "label", in each line'
BLOCK = 1024**2  # characters that are tokenized at once, and as many more as end the line
MOST_TOKENIZER = 256 * 1024**2  # bytes; those of large vocabularies have 20 MB
WORK_BYTES = 24  # of a token: its id, and as input and label
STEP = f'write tokenizer = "tokenizer.json" and length = 128, or others, in {NAME} beside the data'


class Texts(Description, frozen=True, kw_only=True):
    """tokenizer: a tokenizer.json, by its path from data.toml. length: ids of an example. pad: the
    token that fills shorter texts, where the tokenizer names none."""

    tokenizer: str | None = None
    length: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    pad: str | None = None


@dataclass
class _Tokenizer:
    """encoder: of the package tokenizers. name: with a digest of its file, as a device with another
    one gives other numbers to the same words. pad: an id, None: not known."""

    encoder: Any
    path: Path
    length: int
    vocabulary: int
    name: str
    pad: int | None

    def ids(self, text: str, where: str | Path, is_whole: bool) -> list[int]:
        """is_whole: with the tokens that the tokenizer puts before and behind a text. Raises
        DataError."""
        with _mapped(where, f"text that {self.path.name} can take", "correct the text"):
            found: list[int] = self.encoder.encode(text, add_special_tokens=is_whole).ids
        return found

    def cut(self, text: str, where: str | Path) -> tuple[list[int], bool]:
        """The ids of a whole text, at most `length`, and whether there were more."""
        with _mapped(where, f"text that {self.path.name} can take", "correct the text"):
            self.encoder.enable_truncation(self.length)
            found = self.encoder.encode(text)
        return found.ids, bool(found.overflowing)

    def examples(self, x: Ints, y: Ints, path: Path, names: tuple[str, ...] = ()) -> Examples:
        """x: ids of all examples, one after another. y (n, T): next tokens, (n,): classes."""
        is_classes = y.ndim == 1
        examples = Examples(
            x.reshape(-1, self.length),
            y,
            num_classes(y, names) if is_classes else self.vocabulary,
            class_names=names,
            task="classify" if is_classes else "tokens",
            vocabulary=self.vocabulary,
            made_of=f"{self.name}, padded with {self.pad}" if is_classes else self.name,
        )
        return check_examples(examples, str(path))


def _tokenizer(folder: Path, wanted: Texts, path: Path, is_padded: bool) -> _Tokenizer:
    """Raises DataError, and ConfigError without the package."""
    if wanted.tokenizer is None or wanted.length is None:
        lacking = "tokenizer" if wanted.tokenizer is None else "length"
        raise bad(path, f"text without {lacking}", "both", STEP)
    package = optional_module("tokenizers", "text", "text")
    file = folder_of(folder) / wanted.tokenizer
    expected = "a tokenizer.json, as the package tokenizers saves it"
    with _mapped(file, expected, f"correct tokenizer in {NAME}"):
        if file.stat().st_size > MOST_TOKENIZER:
            raise bad(file, f"{file.stat().st_size} bytes", f"at most {MOST_TOKENIZER}")
        content = file.read_bytes()
        encoder = package.Tokenizer.from_buffer(content)
        pad = encoder.padding["pad_id"] if encoder.padding else None
        encoder.no_padding()
        encoder.no_truncation()
        ids = encoder.get_vocab(with_added_tokens=True)
    if not ids:
        raise bad(file, "a vocabulary of 0 tokens", expected)
    if wanted.pad is not None:
        pad = ids.get(wanted.pad)
    if pad is None and (is_padded or wanted.pad is not None):
        got = "no padding" if wanted.pad is None else f"no token {wanted.pad!r:.60}"
        raise bad(file, got, "the token that fills short texts", f'write pad = "TOKEN" in {NAME}')
    vocabulary = max(ids.values()) + 1
    name = f"tokens of {vocabulary} ({hashlib.sha256(content).hexdigest()[:8]})"
    return _Tokenizer(encoder, file, wanted.length, vocabulary, name, pad)


@contextmanager
def _mapped(where: str | Path, expected: str, step: str) -> Iterator[None]:
    """As `mapped`, and of a panic of the package's own, which is no Exception."""
    with mapped(where, expected, step):
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"its package gave up: {error}") from error


# -- the next token, and labels --------------------------------------------------------------------


@dataclass
class _NextTokens:
    """Texts of which every next token is learned: x (n, T), the ids of each text, T after T; y (n,
    T), those that follow, IGNORED from the last one of a text on."""

    tokenizer: _Tokenizer
    path: Path
    x: array[int] = field(default_factory=lambda: array("q"))
    y: array[int] = field(default_factory=lambda: array("q"))
    num_short: int = 0

    def add(self, ids: Sequence[int]) -> None:
        length = self.tokenizer.length
        if len(ids) < 2:
            self.num_short += 1
            return
        num_lacking = -(len(ids) - 1) % length  # the last id only follows, unless there is place
        check_free(self.path, 2 * (8 * num_lacking + len(self.x)), "token ids")
        self.x.extend(ids[: len(ids) - 1 + bool(num_lacking)])
        self.x.extend([self.tokenizer.pad or 0] * (num_lacking - bool(num_lacking)))
        self.y.extend(ids[1:])
        self.y.extend([IGNORED] * num_lacking)

    def examples(self) -> Examples:
        if self.num_short:
            said = "%s: %d texts of less than 2 tokens are left out"
            log.warning(said, self.path, self.num_short)
        if not self.x:
            raise bad(self.path, "no text of 2 tokens or more", "one", "give longer ones")
        return self.tokenizer.examples(
            np.frombuffer(self.x, np.int64),
            np.frombuffer(self.y, np.int64).reshape(-1, self.tokenizer.length),
            self.path,
        )


@dataclass
class _Labelled:
    """Texts with a label each, cut off or filled to the length."""

    tokenizer: _Tokenizer
    path: Path
    x: array[int] = field(default_factory=lambda: array("q"))
    num_cut: int = 0

    def add(self, text: str, where: str | Path) -> None:
        ids, is_cut = self.tokenizer.cut(text, where)
        check_free(self.path, len(self.x) + 8 * self.tokenizer.length, "token ids")
        self.x.extend(ids)
        self.x.extend([self.tokenizer.pad or 0] * (self.tokenizer.length - len(ids)))
        self.num_cut += is_cut

    def examples(self, y: Ints, names: tuple[str, ...]) -> Examples:
        if self.num_cut:
            said = "%s: %d of %d texts are cut off at %d tokens"
            log.warning(said, self.path, self.num_cut, len(y), self.tokenizer.length)
        return self.tokenizer.examples(np.frombuffer(self.x, np.int64), y, self.path, names)


# -- files -----------------------------------------------------------------------------------------


def read_text(paths: Sequence[Path]) -> Examples:
    """Examples (n, T) of one text and the tokens that follow. Raises DataError."""
    (path,) = paths
    tokenizer = _tokenizer(path.parent, described_by(path.parent, Texts), path, is_padded=False)
    ids: array[int] = array("q")
    with mapped(path, EXPECTED), opened(path) as file:
        for block in _blocks(file, path):
            ids.extend(tokenizer.ids(block, path, is_whole=False))
            check_memory(file, path, WORK_BYTES * len(ids), 8 * len(ids))
    text = _NextTokens(tokenizer, path)
    text.add(ids)
    return text.examples()


def _blocks(file: TextIO, path: Path) -> Iterator[str]:
    """The text in parts that end with a line, as hardly a token reaches over a line's end."""
    while block := file.read(BLOCK):
        if not block.endswith("\n"):
            block += next(lines_of(file, path, EXPECTED), "")
        if "\0" in block:
            raise bad(path, "null bytes", EXPECTED, "give another file")
        yield block


def read_text_folders(paths: Sequence[Path]) -> Examples:
    """Examples (n, T) and labels (n,) of text files in a folder for each class. Raises
    DataError."""
    (root,) = paths
    with mapped(root, "folders of text files"):
        wanted = described_by(root, Texts)
        found = class_files(root, ENDINGS, wanted.classes)
        texts = _Labelled(_tokenizer(root, wanted, root, is_padded=True), root)
        for path, _ in found.files:
            with mapped(path, EXPECTED), opened(path) as file:
                text = file.read(MOST_LINE + 1)
            if len(text) > MOST_LINE or "\0" in text:
                most = f"{EXPECTED} of at most {MOST_LINE} characters"
                raise bad(path, "a longer one, or null bytes", most, "remove it")
            texts.add(text, path)
    y = np.array([label for _, label in found.files], np.int64)
    return texts.examples(y, found.class_names)


def read_jsonl(paths: Sequence[Path]) -> Examples:
    """Of lines {"text": ...} the next tokens, each a text of its own; of {"text": ..., "label":
    ...} as of text folders. Raises DataError, which names the line."""
    (path,) = paths
    wanted = described_by(path.parent, Texts)
    with mapped(path, EXPECTED), opened(path) as file:
        lines = _objects(file, path)
        first = next(lines, None)
        if first is None:
            raise bad(path, "no line", OBJECT, "add some")
        is_labelled = first[2] is not None
        tokenizer = _tokenizer(path.parent, wanted, path, is_labelled)
        labelled, free, words = _Labelled(tokenizer, path), _NextTokens(tokenizer, path), Words()
        for where, text, label in chain([first], lines):
            if (label is not None) != is_labelled:
                got = "no label" if is_labelled else "a label"
                raise bad(where, got, "one in each line, or in none", "correct the line")
            if label is None:
                free.add(tokenizer.ids(text, where, is_whole=True))
            else:
                words.add(label)
                labelled.add(text, where)
        if not is_labelled:
            return free.examples()
        return labelled.examples(*class_labels(words, wanted.classes, f"{path}, label"))


def _objects(file: TextIO, path: Path) -> Iterator[tuple[str, str, str | None]]:
    """Where, text and label of each line that holds anything. Raises DataError."""
    for number, line in enumerate(lines_of(file, path, EXPECTED), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        with mapped(where, OBJECT, "correct the line"):
            found = json.loads(line)
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise bad(where, f"{line.strip()!r:.60}", OBJECT, "correct the line")
        if number == 1 and (other := found.keys() - {"text", "label"}):
            log.warning("%s: keys %s are not read", path, shown(other))
        label = found.get("label")
        word = "" if isinstance(label, bool) else str(label).strip()
        if "label" in found and (not word or not isinstance(label, int | float | str)):
            wanted = "a name, or a whole number from 0"
            raise bad(where, f"the label {label!r:.60}", wanted, "correct the line")
        yield where, found["text"], word if "label" in found else None


def _title(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


register_reader(
    FileSet(
        name="text",
        read=read_text,
        train=("train.txt",),
        test=("test.txt",),
        alone=("*.txt",),
        title=_title,
        rank=2,
    ),
    FileSet(
        name="jsonl",
        read=read_jsonl,
        train=("train.jsonl",),
        test=("test.jsonl",),
        alone=("*.jsonl",),
        title=_title,
        rank=2,
    ),
    FileSet(name="texts", read=read_text_folders, by_class=ENDINGS, title=_title),
)
