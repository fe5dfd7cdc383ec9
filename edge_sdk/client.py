"""A device inside a program of your own: what `edge-sdk run` does, with data from memory and a
callback. Like the agent it loads no torch; numpy only for data that is not a file."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_sdk.agent.agent import Agent
from edge_sdk.agent.events import Event
from edge_sdk.agent.options import AgentOptions
from edge_sdk.agent.settings import RunSettings, check_value
from edge_sdk.agent.setup import (
    checked_id,
    default_keys,
    device_secrets,
    make_agent,
    measure_here,
    trainer_options,
)
from edge_sdk.data.contract import checked_names
from edge_sdk.errors import ConfigError
from edge_sdk.hardware import conditions
from edge_sdk.helpers.standard_streams import open_closed_streams
from edge_sdk.helpers.text import parse_size
from edge_sdk.protocol.fields import Task
from edge_sdk.tasks.metrics import METRICS

if TYPE_CHECKING:
    from edge_sdk.data.in_memory import About, Dataset, Source


class Client:
    """This device's part in a coordinator's runs.

    data: a path or name as for --data; or a tuple (x, y) of arrays, x (n, C, H, W), (n, C, window)
    or (n, F) of floats, or of uint8 as in an .npz for --data, y (n,) of integers from 0, or of text
    with class_names; or a torch Dataset with a length, of pairs of such an x and y. A Dataset is
    read once, before training: what it draws at random stays as it was drawn (see augment). Arrays
    and Datasets are written to a file for this user's eyes only under tempfile.gettempdir()
    (TMPDIR) while run() runs: 4 bytes a number; a process that is killed leaves it there. Arrays
    that are not float32 are copied. Of a Dataset it takes twice that for a moment, and in memory a
    quarter of it, or all of it if its items are uint8 (measured: 30 MB for 125 MB).
    layout: "images", "series" or "features", where the axes of x could mean two things or a channel
    axis is missing. class_names: of all classes, in the order of the labels, the same on every
    device. task: what y means, see docs/tasks.md: "classify", "multilabel", "regress", "tokens".
    vocabulary: x are integers below it, token ids (n, T). These four are for arrays and Datasets; a
    file has them in it.
    id: this device's name, default the host name. keys: the folder of this device's keys.
    server_key: the coordinator's public key or its file, default KEYS/server.public.
    memory_cap: most that training may use, bytes or "512M", M of 1024^2. threads: of torch, 0 for
    all cores.
    imports: modules that register your model families or readers. The trainer, another process than
    yours, imports them, so a family cannot live in __main__.
    augment: "MODULE:FUNCTION", which the trainer imports too and calls with every training batch,
    (B, *input_shape) float32 as scaled, in every epoch; it returns another of that shape.
    ignore_conditions: train the same when this device is hot, throttled or on a low battery.
    on_event: called with each Event in the thread of run(), so it must be quick. What it raises is
    logged once.

    Raises ConfigError and DataError for what is wrong with them. Installs no signal handler."""

    def __init__(
        self,
        coordinator: str,
        *,
        data: str | os.PathLike[str] | tuple[Any, Any] | Dataset,
        layout: str | None = None,
        class_names: Sequence[str] = (),
        task: Task = "classify",
        vocabulary: int = 0,
        id: str | None = None,
        keys: str | os.PathLike[str] | None = None,
        server_key: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        memory_cap: str | int | None = None,
        threads: int = 0,
        device: str = "cpu",
        imports: Iterable[str] = (),
        augment: str | None = None,
        ignore_conditions: bool = False,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        open_closed_streams()
        _refuse_inside_trainer()
        cap = None if memory_cap is None else str(memory_cap)
        modules = imports if isinstance(imports, str) else tuple(imports)
        given = {
            "coordinator": coordinator or "",
            "id": id,
            "insecure": insecure,
            "memory_cap": cap,
            "threads": threads,
            "device": device,
            "import": modules,
            "ignore_conditions": ignore_conditions,
            "augment": augment,
        }
        for name, value in given.items():
            check_value(name, value, "imports" if name == "import" else name)
        _check_modules(modules)
        _check_modules([augment.partition(":")[0]] if augment else [], "augment")
        self._endpoint = coordinator
        settings = RunSettings(
            coordinator=coordinator,
            keys=default_keys() if keys is None else Path(keys),
            server_key=None if server_key is None else os.fspath(server_key),
            insecure=insecure,
            memory_cap=None if cap is None else parse_size(cap),
            threads=threads,
            device=device,
            imports=tuple(modules),
            augment=augment,
        )
        self._secrets = device_secrets(settings, "server_key")
        self._data, self._about = _checked_data(data, layout, class_names, task, vocabulary)
        client_id = checked_id(id, "id")
        self._options = AgentOptions(
            client_id=client_id,
            trainer=trainer_options(settings, client_id, self._secrets),
            measure=measure_here(settings.memory_cap),
            conditions=None if ignore_conditions else conditions.read,
            on_event=on_event,
            search_path=tuple(sys.path),
        )
        self._running = threading.Lock()
        self._agent: Agent | None = None
        self._stopped = threading.Event()

    def run(self, once: bool = True) -> None:
        """Take part until the coordinator's run is over, stop() or KeyboardInterrupt.

        once=False: wait for the next run instead. It waits for an absent coordinator and comes back
        after a lost connection by itself. Raises EdgeError: data that cannot be read, a trainer
        that does not start, a coordinator that refuses this device."""
        if not self._running.acquire(blocking=False):
            raise ConfigError("this Client runs already; make another for another device")
        try:
            with suppress(KeyboardInterrupt), self._shard() as data:
                if self._stopped.is_set():
                    return
                trainer = msgspec.structs.replace(self._options.trainer, data=data)
                options = replace(self._options, trainer=trainer, is_once=once)
                self._agent = make_agent(self._endpoint, self._secrets, options)
                if self._stopped.is_set():  # meanwhile
                    self._agent.stop()
                self._agent.run()
        finally:
            self._agent = None
            self._running.release()

    def stop(self) -> None:
        """End run() within a second, for good; from another thread, a signal handler, on_event."""
        self._stopped.set()
        agent = self._agent
        if agent is not None:
            agent.stop()

    def _shard(self) -> AbstractContextManager[str]:
        if isinstance(self._data, str):
            return nullcontext(self._data)
        from edge_sdk.data.in_memory import shard_of

        return shard_of(self._data, self._about)


def _checked_data(
    data: object, layout: str | None, class_names: Sequence[str], task: Task, vocabulary: int
) -> tuple[str | Source, About | None]:
    names = checked_names(class_names, "class_names")
    if isinstance(data, str | os.PathLike):
        if layout is not None or names or task != "classify" or vocabulary:
            said = (
                "layout, class_names, task and vocabulary are for arrays and Datasets; put them "
                "into the file"
            )
            raise ConfigError(f"data {os.fspath(data)!r}: {said}")
        return os.fspath(data), None
    from edge_sdk.data.in_memory import About, checked_source

    if task not in METRICS or not isinstance(vocabulary, int) or vocabulary < 0:
        known = f"expected one of {', '.join(METRICS)}, and a number of token ids or 0"
        raise ConfigError(f"task {task!r}, vocabulary {vocabulary!r}, {known}")
    about = About(layout, names, task, vocabulary)
    return checked_source(data, about), about


def _check_modules(names: Iterable[str], argument: str = "imports") -> None:
    """Found without being imported: they need torch, which this process need not load."""
    for name in names:
        if name == "__main__":
            raise ConfigError(
                f"{argument}: got '__main__', this program itself, which the trainer cannot "
                "import; put the model family or function into a module of its own"
            )
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise ConfigError(f"{argument}: there is no module {name!r}; is it on sys.path?")


def _refuse_inside_trainer() -> None:
    """Raise ConfigError in a trainer: a program that is named in its own `imports` would start
    itself again and again, each trainer another agent with another trainer."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name == "edge_sdk.training.__main__":
        raise ConfigError(
            "a module of `imports` makes a Client when it is imported; put that under "
            'if __name__ == "__main__", or the model family into a module of its own'
        )
