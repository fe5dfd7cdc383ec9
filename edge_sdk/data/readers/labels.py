"""Labels of text, as tables and texts have them: whole numbers, or names of classes."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from edge_sdk.data.contract import bad, checked_names
from edge_sdk.data.examples import Ints
from edge_sdk.data.readers.description import NAME
from edge_sdk.protocol.fields import MAX_OUTPUTS

WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass
class Words:
    """Words as numbers, in the order in which they were seen first."""

    numbers: dict[str, int] = field(default_factory=dict)
    seen: array[int] = field(default_factory=lambda: array("q"))

    def add(self, word: str) -> None:
        self.seen.append(self.numbers.setdefault(word, len(self.numbers)))


def is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return False


def class_labels(words: Words, classes: Sequence[str], where: str) -> tuple[Ints, tuple[str, ...]]:
    """Labels (n,) from 0 and the names of their classes: `classes`, or the words sorted, or ()
    where all words are whole numbers. Raises DataError."""
    seen, found = np.frombuffer(words.seen, np.int64), list(words.numbers)
    if classes:
        names = checked_names(classes, where)
        if unknown := [word for word in found if word not in names]:
            step = "add it there on every device, or correct the data"
            raise bad(where, f"the label {unknown[0]!r:.60}", f"one of classes of {NAME}", step)
        return np.array([names.index(word) for word in found])[seen], names
    whole = [word for word in found if WHOLE.fullmatch(word)]
    if not whole:
        if numbers := [word for word in found if is_number(word)]:
            step = f'write 1 for 1.0; to predict numbers write task = "regress" in {NAME}'
            raise bad(where, f"the label {numbers[0]!r:.60}", "whole numbers or names", step)
        names = checked_names(sorted(found), where)
        places = {name: place for place, name in enumerate(names)}
        return np.array([places[word] for word in found])[seen], names
    if len(whole) < len(found):
        other = next(word for word in found if not WHOLE.fullmatch(word))
        got = f"the labels {whole[0]!r} and {other!r:.60}"
        raise bad(where, got, "whole numbers alone or names alone", f"write classes in {NAME}")
    numbered = np.array(list(map(int, found)), np.int64)
    if numbered.max() >= MAX_OUTPUTS:
        got = f"labels up to {numbered.max()}"
        raise bad(where, got, f"below {MAX_OUTPUTS}", "number the classes from 0")
    return numbered[seen], ()


def num_classes(y: Ints, names: Sequence[str]) -> int:
    return len(names) or max(0, int(y.max())) + 1
