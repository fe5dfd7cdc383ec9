"""The trainer's loop: what the agent asks of it over the pipe, and what it answers.

The trainer is the only process of a device that imports torch. It ends when the agent's end of the
pipe closes. It may be killed for memory at any time; the agent survives, reports it and starts
another trainer."""

from __future__ import annotations

import logging
import select
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace

from edge_sdk.agent.pipe import (
    Cancel,
    Estimate,
    Estimated,
    Inspected,
    Keep,
    Pipe,
    PipeMessage,
    Progress,
    Resume,
    Train,
    TrainerOptions,
)
from edge_sdk.capacity.counting_apart import segment_costs_apart
from edge_sdk.data.contract import ModelNote, names_digest
from edge_sdk.data.examples import check_enough
from edge_sdk.data.loading import Examples, load_shard
from edge_sdk.errors import EdgeError
from edge_sdk.hardware import process_memory
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.hardware.speed import measure_gflops, measure_layer_s
from edge_sdk.protocol.messages import Fault, Fetch, Job, Part, Phase, Update
from edge_sdk.protocol.plan_tensors import FLAT
from edge_sdk.protocol.tensors import Receiver, Sender, specs_of
from edge_sdk.protocol.timing import clock, since
from edge_sdk.training.augmenting import Augment, load_augment
from edge_sdk.training.calibration import MemoryCalibration, memory_calibration, runtime_bytes
from edge_sdk.training.client_state import ClientState
from edge_sdk.training.devices import usable_device
from edge_sdk.training.kept_tensors import KeptTensors
from edge_sdk.training.own_model import weights_to_keep
from edge_sdk.training.saved_update import STATE, SavedUpdate
from edge_sdk.training.segment import num_batches
from edge_sdk.training.trainer import TrainResult, train

log = logging.getLogger(__name__)
WINDOW = 8  # parts asked for ahead: 4 MiB
PROGRESS_S = 1.0  # between signs of life while training
MOST_LOOKED_AT = 100_000  # labels, for whether they are all one
IDLE_S = 10.0  # and while waiting for messages; well below watchdog.THRASHING_S


class TrainerLoop:
    """Answers one agent: says once what the data are, then counts costs and trains as asked."""

    def __init__(
        self,
        pipe: Pipe,
        examples: Examples,
        device: str,
        calibration: MemoryCalibration,
        saved: SavedUpdate,
        state: ClientState,
        kept: KeptTensors,
        augment: Augment | None = None,
    ) -> None:
        self._pipe = pipe
        self._examples = examples
        self._device = device
        self._calibration = calibration
        self._saved = saved
        self._state = state
        self._kept = kept
        self._augment = augment
        needed, self._library_bytes = runtime_bytes()
        self._runtime_bytes = needed + calibration.scratch_bytes
        self._inbox: deque[tuple[PipeMessage, memoryview]] = deque()
        self._job: Job | None = None
        self._run = ""  # of the job
        self._cache_bytes = 0
        self._receiver: Receiver | None = None
        self._update: Update | None = None
        self._sender: Sender | None = None
        self._started = clock()
        self._progress = Progress()  # of the job
        self._progress_at = 0.0  # time.monotonic() of the last sign of life

    def serve(self, gflops: float, layer_s: float) -> None:
        """Answer messages until the agent is gone, which raises EOFError."""
        if finished := self._saved.load():
            self._job, self._update, self._sender = finished
        some = self._examples.y[:: 1 + len(self._examples) // MOST_LOOKED_AT]
        self._pipe.send(
            Inspected(
                num_examples=len(self._examples),
                input_shape=tuple(self._examples.input_shape),
                num_classes=self._examples.num_classes,
                num_labels=len(np.unique(some)),
                task=self._examples.task,
                vocabulary=self._examples.vocabulary,
                scaling=self._examples.input_scaling,
                class_names=names_digest(self._examples.class_names),
                runtime_bytes=self._runtime_bytes,
                gflops=gflops,
                layer_s=layer_s,
                finished=self._job,
            )
        )
        while True:
            message, payload = self._next()
            try:
                with memory_errors("while training"):
                    self._handle(message, payload)
            except EdgeError as error:
                if isinstance(message, Estimate):  # no reason to lose the job in hand or its update
                    self._pipe.send(Fault(code=error.code, detail=str(error)))
                else:
                    self._fail_job(error.code, str(error))

    def _next(self) -> tuple[PipeMessage, memoryview]:
        """Wait for the next message, with a sign of life every IDLE_S."""
        if self._inbox:
            return self._inbox.popleft()
        while not select.select([self._pipe], [], [], IDLE_S)[0]:
            self._tell_progress()
        return self._pipe.receive()

    def _handle(self, message: PipeMessage, payload: memoryview) -> None:
        round = self._job.round if self._job else 0  # of a message about the job in hand
        match message:
            case Estimate(model=model, plan=plan, variants=variants, memory_bytes=memory_bytes):
                count, here = len(self._examples), self._calibration
                costs = segment_costs_apart(
                    model,
                    plan,
                    count,
                    self._runtime_bytes,
                    here.allowance,
                    here.error,
                    memory_bytes,
                    variants=variants,
                )
                self._pipe.send(Estimated(model=model, costs=costs))
            case Keep(run=run, round=kept, job=id):
                self._state.accept(run, kept, id)
            case Train(job=job, run=run, cache_bytes=cache_bytes, accepted=accepted):
                self._forget_job()
                if accepted:
                    self._state.accept(accepted.run, accepted.round, accepted.job)
                self._job, self._run, self._cache_bytes = job, run, cache_bytes
                total = num_batches(job.plan, len(self._examples))
                self._progress = Progress(round=job.round, total=total)
                self._receiver = Receiver(job.tensors)
                self._kept.fill(self._receiver)
                self._started = clock()
                self._request_parts()
            case Part() if self._receiver and message.round == round:
                self._receiver.add(message.index, payload)
                self._request_parts()
            case Fetch() if self._sender and message.round == round:
                self._send_parts(self._sender, message)
            case Cancel():
                self._forget_job()
                self._pipe.send(message)
            case Resume() if self._update:
                self._pipe.send(self._update)
            case Resume() if self._receiver:
                self._receiver.restart()
                self._request_parts()

    def _request_parts(self) -> None:
        """Say how many of the job's parts are here and ask for those that the window allows; train
        once all of them are here."""
        assert self._receiver is not None
        assert self._job is not None
        have = self._receiver.num_received
        first, count = self._receiver.next_request(WINDOW) or (have, 0)
        self._pipe.send(Fetch(round=self._job.round, have=have, first=first, count=count))
        if self._receiver.is_complete:
            self._train(self._job)

    def _train(self, job: Job) -> None:
        assert self._receiver is not None
        download = since(self._started)
        self._kept.check(self._receiver)
        self._kept.keep(self._receiver)
        tensors = self._receiver.tensors()
        self._receiver = None  # the model that is trained is the only copy of the tensors
        self._tell_progress()
        keeps_state = job.plan.keeps_state
        state_round, state = self._state.load(self._run, job.round) if keeps_state else (0, {})
        state.pop(FLAT, None)  # for export alone
        result = train(
            job.model,
            job.plan,
            tensors,
            self._examples,
            state=state,
            state_round=state_round,
            device=self._device,
            cache_bytes=self._cache_bytes,
            should_stop=self._is_cancelled,
            note_epoch=self._note_epoch,
            is_consuming=True,
            augment=self._augment,
        )
        process_memory.trim()
        if kept := result.state | weights_to_keep(job, result.tensors):
            about = ModelNote(spec=job.model, data=self._examples.trained_on)
            model = about if job.plan.flat else None
            self._state.save(self._run, job.round, kept, job.id, model)
        self._sender = Sender(result.tensors)
        idle = max(0, process_memory.library_bytes() - self._library_bytes)
        self._update = make_update(job, result, download, idle, self._sender.digest())
        self._saved.save(job, self._update, self._sender)
        self._pipe.send(self._update)

    def _send_parts(self, sender: Sender, fetch: Fetch) -> None:
        for index in range(fetch.first, min(fetch.first + fetch.count, sender.num_parts)):
            self._pipe.send(Part(round=fetch.round, index=index), sender.part(index))

    def _is_cancelled(self) -> bool:
        """Whether the agent dropped the job; its other messages wait. Asked before every batch, so
        this also tells how far training is. Raises EOFError when the agent is gone."""
        if time.monotonic() - self._progress_at >= PROGRESS_S:
            self._tell_progress()
        self._progress = replace(self._progress, batches=self._progress.batches + 1)
        while select.select([self._pipe], [], [], 0)[0]:
            self._inbox.append(self._pipe.receive())
        return any(isinstance(message, Cancel | Train) for message, _ in self._inbox)

    def _tell_progress(self) -> None:
        self._progress_at = time.monotonic()
        self._pipe.send(self._progress if self._job else Progress())

    def _note_epoch(self) -> None:
        self._progress = replace(self._progress, epochs=self._progress.epochs + 1)

    def _fail_job(self, code: str, detail: str) -> None:
        round = self._job.round if self._job else 0
        self._forget_job()
        self._pipe.send(Fault(code=code, detail=detail, round=round))

    def _forget_job(self) -> None:
        if self._update:
            self._saved.forget()
        if self._receiver:  # what has come of the job need not come again
            self._kept.keep(self._receiver)
        self._job = self._receiver = self._update = self._sender = None


def prepare(pipe: Pipe, options: TrainerOptions) -> Callable[[], None]:
    """Read the data, train a tiny job and measure; what is returned then answers the agent until it
    is gone, which raises EOFError. Raises EdgeError for data or a device that cannot be used."""
    if options.threads:
        torch.set_num_threads(options.threads)
    examples = check_enough(load_shard(options.data), options.data)
    device, may_measure = options.device, options.measure_compute
    usable_device(device)
    x = torch.from_numpy(examples.x)
    augment = load_augment(options.augment, x) if options.augment else None
    calibration_file = Path(options.calibration) if options.calibration else None
    calibration = memory_calibration(calibration_file, device, may_measure)
    # Measured at every start: speed depends on what else runs.
    threads = torch.get_num_threads()
    gflops = measure_gflops(threads=threads, device=device) if may_measure else 0.0
    layer_s = measure_layer_s(threads=threads, device=device) if may_measure else 0.0
    folder = Path(options.saved_updates) if options.saved_updates else None
    saved, state = SavedUpdate(folder), ClientState(folder and folder / STATE)
    kept = KeptTensors(Path(options.kept_tensors) if options.kept_tensors else None)
    loop = TrainerLoop(pipe, examples, device, calibration, saved, state, kept, augment)
    return partial(loop.serve, gflops, layer_s)


def make_update(
    job: Job, result: TrainResult, download: Phase, idle_bytes: int, digest: str
) -> Update:
    """The message that goes ahead of the update's tensors. idle_bytes: resident memory that
    training did not need, which its peak counts too."""
    return Update(
        job=job.id,
        digest=digest,
        round=job.round,
        num_examples=result.num_examples,
        num_steps=result.num_steps,
        exits=result.exits,
        phases={"download": download, **result.phases},  # type: ignore[dict-item]
        peak_memory_bytes=max(0, result.peak_memory_bytes - idle_bytes),
        micro_batch=job.plan.micro_batch,
        recompute=job.plan.recompute,
        holdout=result.holdout,
        state_round=result.state_round,
        tensors=specs_of(result.tensors),
    )
