"""Emulated clients in several processes; the same updates, in the same order, to the bit."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from coordinator.cohorts.base import Absence, Assignment, Client, ClientUpdate
from coordinator.cohorts.in_process import InProcessCohort, train_from
from edge_sdk.data.loading import Examples
from edge_sdk.errors import TrainerError
from edge_sdk.helpers.imports import import_module
from edge_sdk.protocol.tensors import Tensors

_shards: dict[str, Examples] = {}  # of a worker process, set once when it starts


class ProcessCohort:
    """The clients of `inner`, trained by `processes` workers, each with a copy of all shards. Jobs
    and updates cross as numpy arrays; at most 2 x processes updates are held at once. Close it, or
    use `with`.

    imports: modules that register model families. threads: torch's, of each worker."""

    def __init__(
        self, inner: InProcessCohort, processes: int, *, imports: Sequence[str] = (), threads: int
    ) -> None:
        self._inner = inner
        self._processes = processes
        self._pool = ProcessPoolExecutor(
            processes,
            multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(dict(inner.shards), tuple(imports), threads),
        )

    def clients(self) -> Sequence[Client]:
        return self._inner.clients()

    def accept(self, round: int, client_ids: Iterable[str]) -> None:
        self._inner.accept(round, client_ids)

    def newest(self, client_id: str) -> Tensors:
        return self._inner.newest(client_id)

    def rest(self, tries: int) -> bool:
        return self._inner.rest(tries)

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]:
        """As InProcessCohort.train. Raises TrainerError if a worker process died."""
        by_id = {client.id: client for client in self.clients()}
        waiting = deque(work.items())
        running: deque[tuple[Assignment, Future[tuple[ClientUpdate | Absence, Any]]]] = deque()
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self._processes:
                    client_id, job = waiting.popleft()
                    state_round, state = self._inner.kept(client_id, job, round)
                    kept = state_round, _arrays(state)
                    future = self._submit(by_id[client_id], _as_arrays(job), kept)
                    running.append((job, future))
                job, future = running.popleft()
                result, state = future.result()
                if isinstance(result, ClientUpdate):
                    result = _as_tensors(result)
                yield self._inner.keep(round, job, result, _tensors(state))
        except BrokenProcessPool as error:
            raise TrainerError(
                f"round {round}: an emulating process died, out of memory? Use fewer --processes"
            ) from error
        finally:
            for _, future in running:
                future.cancel()

    def _submit(
        self, client: Client, job: Assignment, kept: tuple[int, Any]
    ) -> Future[tuple[ClientUpdate | Absence, Any]]:
        """A worker that this starts inherits the mask: Ctrl-C goes to the whole process group, but
        it is for this process to stop, after the round."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(_train, client, job, kept)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> ProcessCohort:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


def _start(shards: dict[str, Examples], imports: Sequence[str], threads: int) -> None:
    torch.set_num_threads(threads)
    for module in imports:
        import_module(module)
    _shards.update(shards)


def _train(
    client: Client, job: Assignment, kept: tuple[int, Any]
) -> tuple[ClientUpdate | Absence, Any]:
    from_state = kept[0], _tensors(kept[1])
    result, state = train_from(client, _as_tensors(job), _shards[client.id], "cpu", from_state)
    return _as_arrays(result) if isinstance(result, ClientUpdate) else result, _arrays(state)


def _as_arrays(message: Assignment | ClientUpdate):  # type: ignore[no-untyped-def]
    """The same with numpy arrays: torch would hand every tensor over by a file descriptor."""
    return replace(message, tensors=_arrays(message.tensors))


def _as_tensors(message: Assignment | ClientUpdate):  # type: ignore[no-untyped-def]
    return replace(message, tensors=_tensors(message.tensors))


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _tensors(arrays: Mapping[str, Any]) -> Tensors:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
