"""Data to pre-train on, and data of a shifted distribution to go on with, from what is here.

    python -m tools.experiments classes --data cifar-100 --from 0 --to 49 --out build/first
    python -m tools.experiments texts --out build/texts

`classes` writes the examples of some classes of a data set as one of its own, labelled from 0.

`texts` writes build/texts/prose (the docstrings of the standard library and of numpy) and
build/texts/code (the program text of packages of the standard library without docstrings, a topic
each), as bytes of which the next one is learned. With one Python and one numpy they are the same
everywhere; topics that a Python lacks are told. Test parts are of files of their own. Each of
`--people` has a share of every topic's examples that is drawn from Dirichlet(alpha) and becomes the
`subject`, as `--split dirichlet` is of classes alone.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.cli.flags import whole_flag
from edge_sdk.data.examples import Examples
from edge_sdk.data.loading import load, save_shard
from edge_sdk.data.partition import partition_dirichlet
from edge_sdk.errors import ConfigError, DataError

TOPICS = (
    *("asyncio", "email", "http", "idlelib", "importlib", "logging"),
    *("multiprocessing", "re", "tkinter", "unittest", "urllib", "xml"),
)
PROSE = ("numpy",)  # beside the standard library
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TEST_FILE = 5
VOCABULARY = 256
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def add_commands(commands: Any) -> None:
    classes = commands.add_parser("classes", help="some classes of a data set as one of its own")
    classes.add_argument("--data", required=True, metavar="SOURCE")
    classes.add_argument("--from", dest="first", type=whole_flag(0, 10**6), required=True)
    classes.add_argument("--to", dest="last", type=whole_flag(0, 10**6), required=True)
    classes.add_argument("--out", type=Path, required=True, help="folder of both parts")
    classes.set_defaults(run=run_classes)
    texts = commands.add_parser("texts", help="prose and program text that come with Python")
    texts.add_argument("--out", type=Path, required=True, help="folder of prose/ and code/")
    texts.add_argument("--length", type=whole_flag(2, 4096), default=64, help="bytes of an example")
    texts.add_argument("--examples", type=whole_flag(10, 10**6), default=60, help="of each topic")
    texts.add_argument("--test-examples", type=whole_flag(1, 10**6), default=20, help="of a topic")
    texts.add_argument("--people", type=whole_flag(2, 10**4), default=12)
    texts.add_argument("--alpha", type=float, default=0.5, help="of their shares of each topic")
    texts.set_defaults(run=run_texts)


# -- classes ---------------------------------------------------------------------------------------


def run_classes(args: argparse.Namespace) -> int:
    _, train, test = load(args.data)
    if test is None:
        raise ConfigError(f"--data {args.data} has no test part; give data with one")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        chosen = of_classes(part, args.first, args.last)
        save_shard(args.out / f"{name}.npz", chosen)
        print(f"{len(chosen)} examples of {chosen.num_classes} classes in {args.out}/{name}.npz")
    return 0


def of_classes(examples: Examples, first: int, last: int) -> Examples:
    """Those of the classes first to last, which become 0 to last - first. Raises ConfigError."""
    if examples.task != "classify":
        raise ConfigError(f"the data are for {examples.task}; give data of classes")
    if not 0 <= first < last < examples.num_classes:
        wanted = f"expected two of the classes 0 to {examples.num_classes - 1} in order"
        raise ConfigError(f"--from {first} --to {last}, {wanted}")
    found = examples.take(np.flatnonzero((examples.y >= first) & (examples.y <= last)))
    names = examples.class_names[first : last + 1]
    return replace(found, y=found.y - first, num_classes=last - first + 1, class_names=names)


# -- texts -----------------------------------------------------------------------------------------


def run_texts(args: argparse.Namespace) -> int:
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, tuple[list[Examples], list[Examples]]] = {"prose": ([], []), "code": ([], [])}
    for folder in (library, *map(package_folder, PROSE)):
        for found, texts in zip(parts["prose"], split_files(docstrings(folder)), strict=True):
            found.append(next_bytes(texts, args.length))
    topics = [topic for topic in TOPICS if (library / topic).is_dir()]
    for topic in sorted(set(TOPICS) - set(topics)):
        print(f"this Python has no {topic}")
    numbers = (args.examples, args.test_examples)
    for topic in topics:
        files = split_files(programs(library / topic))
        for found, texts, most in zip(parts["code"], files, numbers, strict=True):
            found.append(next_bytes(texts, args.length, most))
    for name, held in parts.items():
        (args.out / name).mkdir(parents=True, exist_ok=True)
        train, test = map(joined, held)
        if name == "code":
            topic_of = np.repeat(np.arange(len(topics)), [len(part) for part in held[0]])
            train = replace(train, subject=owners(topic_of, args.people, args.alpha))
        for part, examples in (("train", train), ("test", test)):
            save_shard(args.out / name / f"{part}.npz", examples)
            print(f"{len(examples)} examples of {args.length} bytes in {name}/{part}.npz")
    return 0


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ConfigError(f"package {name} is not installed; its docstrings are wanted")
    return Path(spec.origin).parent


def trees(folder: Path) -> Iterator[ast.Module]:
    """Of every Python file but tests, by name; what this Python cannot parse is left out."""
    for path in sorted(folder.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(folder).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            try:
                yield ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue


def docstrings(folder: Path) -> Iterator[str]:
    """Those of each file as one text, of files that have any."""
    for tree in trees(folder):
        found = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, DOCUMENTED))
        if text := "\n\n".join(filter(None, found)):
            yield text


def programs(folder: Path) -> Iterator[str]:
    """Each file's program without docstrings and comments, in one layout."""
    for tree in trees(folder):
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        if text := ast.unparse(tree):
            yield text


def split_files(texts: Iterator[str]) -> tuple[list[str], list[str]]:
    """For training and for testing: every fifth file, of fewer the last one."""
    held = list(texts)
    every = min(TEST_FILE, max(2, len(held)))
    return [text for n, text in enumerate(held, 1) if n % every], held[every - 1 :: every]


def next_bytes(texts: Sequence[str], length: int, most: int | None = None) -> Examples:
    """Examples of `length` bytes and those that follow, at most so many, at equal distances over
    all texts. Raises DataError for fewer."""
    data = np.frombuffer("\n\n".join(texts).encode(), np.uint8).astype(np.int64)
    count = max(0, len(data) - 1) // length
    if count < (most or 1):
        raise DataError(f"{len(data)} bytes of text, {most or 1} examples of {length} are wanted")
    chosen = np.arange(count) if most is None else np.arange(most) * count // most
    places = chosen[:, None] * length + np.arange(length)  # (n, T)
    return Examples(
        data[places],
        data[places + 1],
        VOCABULARY,
        made_of="bytes",
        task="tokens",
        vocabulary=VOCABULARY,
    )


def joined(parts: Sequence[Examples]) -> Examples:
    x, y = (np.concatenate([getattr(part, name) for part in parts]) for name in "xy")
    return replace(parts[0], x=x, y=y)


def owners(topic: np.ndarray[Any, np.dtype[np.int64]], people: int, alpha: float) -> Any:
    """(n,) who of them has each example; the same in every run."""
    found = np.empty(len(topic), np.int64)
    for person, rows in enumerate(partition_dirichlet(topic, people, alpha, seed=0)):
        found[rows] = person
    return found
