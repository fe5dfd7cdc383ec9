"""An exported model: a folder that inference reads, on any machine and without torch.

    model.json        what it is (ExportedModel), its files with their SHA-256
    whole.onnx        all exits at once: input -> exit_1 .. exit_n, for other runtimes
    stage_1.onnx ...  one stage with its exit: input -> features, logits; the last: input -> logits
    calibration.json  when to stop at which exit on this device (ExitThresholds), once chosen

A file is used only if its SHA-256 is the one written down: half a copy is refused, not run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from edge_sdk.errors import StoreError
from edge_sdk.helpers.files import is_there, make_parent, sha256_of, why_not
from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.fields import Figure, Input, Measure, Share, Struct, Text
from edge_sdk.protocol.messages import InputScaling, ModelSpec
from edge_sdk.tasks.metrics import METRICS, Metric

FORMAT: Literal[1] = 1
MODEL, WHOLE, THRESHOLDS = "model.json", "whole.onnx", "calibration.json"
STAGES = "stage_*.onnx"
T = TypeVar("T", bound=Struct)


class ModelFile(Struct, frozen=True, kw_only=True):
    """A file of the folder; its name leads nowhere else."""

    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_]+\.onnx\Z", max_length=100)]
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class ExportedModel(Struct, frozen=True, kw_only=True):
    """model.json. scaling (divisor, offset): the training inputs were integer / divisor - offset;
    None: they were floats, or it is not known. input_range: their smallest and largest; None: not
    known. made_of: what they are, as `InputScaling` says. class_names: in the order of the labels;
    (): not known. output_spread: of the task regress, the standard deviation of each value over the
    inputs that it was checked on. batch_norms: how many BatchNormalization nodes are left in
    whole.onnx; those after a convolution or a linear layer are folded into it. largest_difference:
    to torch's logits, over the largest of them; checked_on: which inputs."""

    format: Literal[1] = FORMAT
    spec: ModelSpec  # exit = number of exits here
    opset: int
    batch_norms: int
    scaling: tuple[Annotated[float, Meta(gt=0)], float] | None
    input_range: tuple[Input, Input] | None = None
    made_of: Text = ""
    class_names: tuple[str, ...] = ()
    output_spread: tuple[Annotated[float, Meta(gt=0)], ...] = ()
    whole: ModelFile
    stages: tuple[ModelFile, ...]
    largest_difference: float
    checked_on: str

    def __post_init__(self) -> None:
        if len(self.stages) != self.spec.exit:
            raise ValueError(f"{len(self.stages)} stages for {self.spec.exit} exits")
        if len(self.class_names) not in (0, self.spec.num_classes):
            raise ValueError(f"{len(self.class_names)} class names for {self.spec.num_classes}")
        if len(self.output_spread) not in (0, self.spec.num_classes):
            raise ValueError(f"{len(self.output_spread)} spreads for {self.spec.num_classes}")

    @property
    def metric(self) -> Metric:
        return METRICS[self.spec.task]

    @property
    def inputs(self) -> InputScaling | None:
        """How the training inputs were scaled; None: not known. A range of 0 to 0 tells nothing."""
        if self.input_range is None and self.scaling is None:
            return None
        low, high = self.input_range or (0.0, 0.0)
        divisor, offset = self.scaling or (None, 0.0)
        made_of = self.made_of
        return InputScaling(low=low, high=high, divisor=divisor, offset=offset, made_of=made_of)


class ExitThresholds(Struct, frozen=True, kw_only=True):
    """calibration.json: an example stops at the first exit whose confidence by `measure` reaches
    that exit's threshold; the last exit has none. Metrics (of the model's task), latency at batch 1
    and `exit_shares` (where examples stop) are those on the held-out examples."""

    format: Literal[1] = FORMAT
    model_sha256: str  # of the model.json that it is for
    measure: Measure
    thresholds: tuple[Annotated[float, Meta(ge=0)], ...]
    wanted: str
    num_examples: int
    metric: Figure
    deepest_metric: Figure
    latency_s: float
    exit_shares: tuple[Share, ...]
    threads: int


def read_model(folder: Path) -> ExportedModel:
    """What the folder's model is. Raises StoreError: none there, corrupt, or of another version."""
    if not is_there(folder / MODEL):
        wanted = "expected a folder made by edge-sdk export or edge-coordinator export"
        raise StoreError(f"{folder}: no {MODEL} there, {wanted}")
    return _read(folder / MODEL, ExportedModel, "export the model again")


def read_thresholds(folder: Path, model: ExportedModel) -> ExitThresholds | None:
    """The thresholds that were chosen for the model here, None if none were. Raises StoreError:
    corrupt, of another version or of another model."""
    path, step = folder / THRESHOLDS, "run edge-sdk calibrate again"
    if not is_there(path):
        return None
    found = _read(path, ExitThresholds, step)
    wanted = sha256_of(_bytes(folder / MODEL, step))
    if found.model_sha256 != wanted or len(found.thresholds) != model.spec.exit - 1:
        raise StoreError(f"{path} belongs to another model than the {MODEL} beside it; {step}")
    return found


def read_file(folder: Path, file: ModelFile) -> bytes:
    """The content of a file of the folder, checked against its SHA-256. Raises StoreError."""
    step = "copy the folder again"
    content = _bytes(folder / file.name, step)
    if (got := sha256_of(content)) != file.sha256:
        wanted = f"expected {file.sha256[:12]}...: changed or cut off; {step}"
        raise StoreError(f"{folder / file.name}: SHA-256 {got[:12]}..., {wanted}")
    return content


def check_target(folder: Path) -> None:
    """Raise StoreError unless an exported model can be written there: nothing is there yet, or an
    empty folder, or an exported model and nothing else. Leaves nothing but the folders above it."""
    try:
        names = sorted(os.listdir(folder)) if is_there(folder) else []
    except OSError as error:
        raise StoreError(f"{folder} is no folder that can be read: {why_not(error)}") from error
    ours = (MODEL, WHOLE, THRESHOLDS)
    strange = [name for name in names if name not in ours and not fnmatchcase(name, STAGES)]
    if strange:
        raise StoreError(
            f"{folder} holds {strange[0]}, which is no part of an exported model; choose a new "
            "folder"
        )
    try:
        make_parent(folder)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder.resolve().parent):
            pass
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {why_not(error)}") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty draft beside `folder`, which it replaces at the end; after an error nothing has
    changed. Raises StoreError as check_target does, or if it cannot be written.

    A folder is replaced by two renames, as not every system can exchange two names at once. If the
    process is killed between them, `folder` is gone: the old model is beside it in `.NAME.PID.old`,
    the new one in `.NAME.PID.tmp`, and either can be renamed by hand."""
    check_target(folder)
    named, folder = folder, folder.resolve()
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        draft.mkdir()
        yield draft
        if folder.exists():
            os.rename(folder, old)
        os.rename(draft, folder)
    except OSError as error:
        raise StoreError(f"{named} cannot be written: {why_not(error)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):  # where it cannot be brought back, it is not deleted either
            if not folder.exists():
                os.rename(old, folder)
            shutil.rmtree(old, ignore_errors=True)


def _bytes(path: Path, step: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; {step}") from error


def _read(path: Path, kind: type[T], step: str) -> T:
    content = _bytes(path, step)
    try:
        plain: Any = msgspec.json.decode(content)
        if isinstance(plain, dict) and plain.get("format", FORMAT) != FORMAT:
            got = one_line(repr(plain["format"]), 40)
            advice = f"use the version that wrote it, or {step}"
            raise StoreError(f"{path} has format {got}, this edge-sdk reads {FORMAT}; {advice}")
        return msgspec.convert(plain, kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} refused: {one_line(str(error))}; {step}") from error


def described(model: ExportedModel, folder: Path) -> str:
    """What an export has written, in one line."""
    spec = model.spec
    return (
        f"wrote {folder}: {spec.family}, input {'x'.join(map(str, spec.input_shape))}, "
        f"{spec.num_classes} {model.metric.outputs}, exits 1 to {spec.exit}; largest difference "
        f"to torch {model.largest_difference:.1e} of the largest logit, on {model.checked_on}"
    )
