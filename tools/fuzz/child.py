"""The fuzzer itself, run by tools.fuzz in the environment that has atheris.

libFuzzer never returns, so this ends the process by itself once enough inputs have been handled.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import logging
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris
import hypothesis  # noqa: F401  what is foreign is imported before anything is instrumented
import msgpack  # noqa: F401
import torch
import zmq  # noqa: F401

with atheris.instrument_imports(include=["edge_sdk", "coordinator"]):
    from edge_sdk.helpers.files import write_whole
    from tools.fuzz.fakes import OneLine, small_world
    from tools.fuzz.inputs import mutate_acts, mutate_frame, seeds_of_handler, unpack_acts
    from tools.fuzz.messages import drawn_frames
    from tools.fuzz.targets import decode_one, handler_one
    from tools.fuzz.world import Seen, World

from tools.fuzz.__main__ import BUILD, REGRESSIONS

MAX_FAILURES = 20  # different ones; then the run ends
KEPT = 2000  # inputs that are given again to see whether memory grows
ACTS_PER_ROUND = 500
PER_MESSAGE = 60  # messages drawn of every type, to begin with


class Run:
    """Counts inputs of one target, keeps what failed, writes the result."""

    def __init__(self, target: str, most: int, most_s: float) -> None:
        self.target, self.most, self.most_s = target, most, most_s
        self.folder = BUILD / "fuzz" / target
        self.seen = Seen()
        self.sequences = self.accepted = 0
        self.slowest_ms = 0.0
        self.failures: dict[str, int] = {}  # place of the failure to the size of its input
        self.kept: list[bytes] = []
        self.started = time.monotonic()

    def __call__(self, data: bytes) -> None:
        start = time.thread_time()
        try:
            if self.target == "decode":
                self.seen.inputs += 1
                message = decode_one(data)
                self.seen.answers[type(message).__name__] += 1
                self.accepted += message is not None
                self.seen.refused += message is None
            else:
                handler_one(data, self.seen)
        except Exception as error:
            self.fail(data, error)
        self.sequences += 1
        self.slowest_ms = max(self.slowest_ms, 1000 * (time.thread_time() - start))
        if self.sequences % 97 == 0 and len(self.kept) < KEPT:
            self.kept.append(data)
        if self.sequences % 1000 == 0:
            self.write("progress", self.told())  # to be looked at
        is_late = time.monotonic() - self.started > self.most_s
        if is_late or self.seen.inputs >= self.most or len(self.failures) >= MAX_FAILURES:
            self.end()

    def fail(self, data: bytes, error: Exception) -> None:
        """Keep the shortest input of every place where something failed."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} {last.name}:{last.lineno} {str(error)[:60]}"
        name = hashlib.sha256(kind.encode()).hexdigest()[:10]
        if len(data) >= self.failures.get(name, sys.maxsize):
            return
        self.failures[name] = len(data)
        (self.folder / f"failed-{name}.bin").write_bytes(data)
        trace = "".join(traceback.format_exception(error))
        (self.folder / f"failed-{name}.txt").write_text(f"{kind}\n{trace}\n{shown(data)}\n")

    def end(self) -> None:
        told = self.told()
        self.write("progress", told)
        self.write("result", told | self.growth())
        sys.stderr.flush()
        os._exit(0)

    def told(self) -> dict[str, Any]:
        return {
            "inputs": self.seen.inputs,
            "sequences": self.sequences,
            "seconds": round(time.monotonic() - self.started),
            "cpu_s": round(time.process_time()),
            "refused": self.seen.refused,
            "accepted": self.accepted,
            "updates": self.seen.updates,
            "changes": self.seen.changes,
            "failures": len(self.failures),
            "slowest_ms": round(self.slowest_ms, 1),
            "answers": " ".join(f"{k}:{n}" for k, n in self.seen.answers.most_common()),
        }

    def write(self, name: str, told: dict[str, Any]) -> None:
        write_whole(self.folder / f"{name}.json", json.dumps(told), is_synced=False)

    def growth(self) -> dict[str, float]:
        """Memory after 10,000 more inputs of those seen and after 110,000, in one coordinator."""
        kept = itertools.cycle(self.kept or [b""])
        told: dict[str, float] = {}
        repeat = self.decode_again if self.target == "decode" else self.handle_again
        done = repeat(kept)
        for name, inputs in (("10k", 10_000), ("110k", 110_000)):
            while next(done) < inputs:
                pass
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            told[f"rss_mb_{name}"] = round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
            told[f"objects_{name}"] = len(gc.get_objects())
        return told

    def decode_again(self, kept: Iterator[bytes]) -> Iterator[int]:
        for count in itertools.count(1):
            try:
                decode_one(next(kept))
            except Exception as error:  # noted when it was seen first
                del error
            yield count

    def handle_again(self, kept: Iterator[bytes]) -> Iterator[int]:
        world = World(is_judged=False)
        acts = itertools.chain.from_iterable(map(unpack_acts, kept))
        while True:
            try:
                world.play(itertools.islice(acts, ACTS_PER_ROUND))
            except Exception:
                world = World(is_judged=False, seen=world.seen)
            yield world.seen.inputs


def shown(data: bytes) -> str:
    return "\n".join(f"{route}: {frames!r:.2000}" for route, frames in unpack_acts(data))


def mutator(target: str, pool: list[bytes]) -> Callable[[bytes, int, int], bytes]:
    change = mutate_frame if target == "decode" else mutate_acts

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        return change(data, random.Random(seed), atheris.Mutate, pool)[:max_size]

    return mutate


def main() -> None:
    target, inputs, seed, minutes = sys.argv[1:]
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, handlers=[OneLine()])
    with small_world():
        run = Run(target, int(inputs), 60 * float(minutes))
        corpus = run.folder / "corpus"
        corpus.mkdir()
        pool = drawn_frames(PER_MESSAGE, int(seed))
        seeds = pool[::10] if target == "decode" else seeds_of_handler()
        seeds += [path.read_bytes() for path in REGRESSIONS.glob(f"{target}-*.bin")]
        for number, data in enumerate(seeds):
            (corpus / f"seed-{number:03}").write_bytes(data)
        options = [f"-seed={seed}", "-max_len=16384", "-timeout=120", "-len_control=0"]
        command = [sys.argv[0], *options, "-rss_limit_mb=4096", str(corpus)]
        atheris.Setup(command, run, custom_mutator=mutator(target, pool))
        gc.freeze()  # torch's 180,000 objects need not be looked through again and again
        atheris.Fuzz()


if __name__ == "__main__":
    main()
