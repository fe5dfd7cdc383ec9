"""A trained model as ONNX: whole with one output per exit, and stage by stage for early exit.

The model is first rewritten in layers that ONNX has, BatchNorm folded (onnx_layers.py). Then both
forms are run by onnxruntime and compared with the untouched torch model in eval mode; what differs
by more than TOLERANCE is not written. torch's older exporter is used: the newer one needs
onnxscript and takes ten times as long (7.6 s against 0.6 s for a cnn of three exits)."""

from __future__ import annotations

import importlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from edge_sdk.data.contract import NOT_KNOWN, ModelNote, TrainedOn, mismatch
from edge_sdk.data.examples import Examples, Floats, Ints
from edge_sdk.errors import ConfigError, DataError, EdgeError, StoreError
from edge_sdk.helpers.files import sha256_of, write_file, write_struct
from edge_sdk.helpers.imports import optional_module
from edge_sdk.helpers.text import one_line
from edge_sdk.infer.early_exit import NEVER, EarlyExit, open_session
from edge_sdk.infer.model_folder import (
    MODEL,
    WHOLE,
    ExportedModel,
    ModelFile,
    check_target,
    new_folder,
    read_file,
    read_model,
)
from edge_sdk.infer.onnx_layers import plain_model
from edge_sdk.models import StagedModel, build, family_code
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors, check_finite

log = logging.getLogger(__name__)
OPSET = 17
TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order differ by about 1e-6
CHECKED = 64  # examples
BATCHES = (1, 3, CHECKED)  # a batch size that an exporter took for a constant shows in one of them


def export(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    *,
    examples: Examples | None = None,
    trained_on: TrainedOn | None = None,
) -> ExportedModel:
    """Write the model of `spec` with these weights as an exported model (model_folder.py).

    examples: real inputs to check it on; None: random ones. trained_on: scaling and class names;
    None: those of the examples. Raises ConfigError for a model that cannot be built or exported, or
    if a package is missing, ShapeError for tensors that do not fit, StoreError where the folder
    cannot be written or the result differs from torch."""
    check_packages()
    check_target(Path(folder))
    made, whole, stages = _exported(spec, tensors, examples, trained_on)
    _write(made, whole, stages, Path(folder))
    return made


def check_exportable(
    spec: ModelSpec, tensors: Mapping[str, Tensor], examples: Examples | None
) -> None:
    """Raise, before training, what `export` would raise of such a model; nothing is written. The
    parameters are moved a little, as training will: those of exactly 0 or 1 are optimised away."""
    own = {name for name, _ in build(spec).named_parameters()}
    moved = {n: t * 1.01 + 0.001 if n in own else t for n, t in tensors.items()}
    _exported(spec, moved, examples, None)


def _exported(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    examples: Examples | None,
    trained_on: TrainedOn | None,
) -> tuple[ExportedModel, bytes, list[bytes]]:
    """The model's description, its whole ONNX and each stage's, compared with torch."""
    check_finite(tensors, "weights to export")
    reference = build(spec)
    reference.load({name: tensor.cpu() for name, tensor in tensors.items()})
    reference.eval().requires_grad_(False)
    x = _inputs(spec, examples)
    with family_code(spec, "exporting", reference):
        plain = plain_model(reference, torch.from_numpy(x[:1]))
        with _exporter():
            whole, stages = _onnx_of(plain, spec, torch.from_numpy(x[:2]))
    data = _trained_on(examples, trained_on)
    inputs = data.scaling
    rule = (inputs.divisor, inputs.offset) if inputs and inputs.divisor is not None else None
    made = ExportedModel(
        spec=spec,
        opset=OPSET,
        batch_norms=_batch_norms(whole),
        scaling=rule,
        input_range=(inputs.low, inputs.high) if inputs else None,
        made_of=inputs.made_of if inputs else "",
        class_names=data.class_names,
        whole=ModelFile(name=WHOLE, sha256=sha256_of(whole)),
        stages=_stage_files(stages),
        largest_difference=0.0,
        checked_on=f"{len(x)} {'random inputs' if examples is None else 'examples'}",
    )

    def torch_logits(part: Floats | Ints) -> Floats:
        return np.stack([logits.numpy() for logits in reference(torch.from_numpy(part))])

    spread = _spread(torch_logits(x)[-1]) if spec.task == "regress" else ()
    difference = _checked(made, whole, stages, x, torch_logits)
    return replace(made, largest_difference=difference, output_spread=spread), whole, stages


def cut(source: str | Path, exit: int, folder: str | Path) -> ExportedModel:
    """An exported model's part up to `exit`, as another exported model. Chosen thresholds do not go
    with it: they are of other exits. Raises ConfigError, StoreError."""
    check_packages()
    source = Path(source)
    model = read_model(source)
    if not 1 <= exit <= model.spec.exit:
        raise ConfigError(f"exit {exit} of a model of {model.spec.exit} exits; take one of them")
    contents = [read_file(source, file) for file in model.stages]
    check_target(Path(folder))
    x = _inputs(model.spec, None)
    exits = [f"exit_{number}" for number in range(1, exit + 1)]
    whole = _outputs_only(read_file(source, model.whole), exits)
    stages = [*contents[: exit - 1], _outputs_only(contents[exit - 1], ["logits"])]
    made = replace(
        model,
        spec=replace(model.spec, exit=exit),
        batch_norms=_batch_norms(whole),
        whole=ModelFile(name=WHOLE, sha256=sha256_of(whole)),
        stages=_stage_files(stages),
    )
    before = _engine(model, contents)
    _checked(made, whole, stages, x, lambda part: before.all_exits(part)[:exit])
    _write(made, whole, stages, Path(folder))
    return made


def prefix(
    spec: ModelSpec, tensors: Mapping[str, Tensor], exit: int | None
) -> tuple[ModelSpec, Tensors]:
    """The model's part up to `exit`; None: all of it. Raises ConfigError for one it has not."""
    exit = spec.exit if exit is None else exit
    if not 1 <= exit <= spec.exit:
        raise ConfigError(f"exit {exit} of a model of {spec.exit} exits; take one of them")
    part = {name: tensor for name, tensor in tensors.items() if stage_of(name)[1] <= exit}
    return replace(spec, exit=exit), part


def read_weights(path: Path) -> tuple[ModelSpec, Tensors]:
    """Spec and tensors of a model.safetensors as the coordinator writes it at the end of a run.
    Raises StoreError for another file, ConfigError without safetensors."""
    safetensors = _package("safetensors.torch")
    errors = (OSError, importlib.import_module("safetensors").SafetensorError)
    expected = "a model.safetensors of a coordinator's run folder"
    try:
        note = _note(path)
        tensors: Tensors = safetensors.load_file(path)
        return note.spec, tensors
    except errors as error:
        raise StoreError(f"{path}: {one_line(str(error))}, expected {expected}") from error
    except KeyError as error:
        wanted = f"expected {expected}; for a checkpoint use edge-coordinator export --run"
        raise StoreError(f"{path} does not say what model it is of, {wanted}") from error
    except msgspec.MsgspecError as error:
        raise StoreError(f"{path}: {error}; made by another version of edge-sdk?") from error


def read_trained_on(path: Path) -> TrainedOn | None:
    """What such a file says of the data that it was trained for; None: an older one, which does
    not. Raises StoreError, ConfigError."""
    try:
        return _note(path).data
    except KeyError:
        return None
    except msgspec.MsgspecError as error:
        raise StoreError(f"{path}: {error}; made by another version of edge-sdk?") from error


def _note(path: Path) -> ModelNote:
    """Raises KeyError for a file that says nothing of itself."""
    with importlib.import_module("safetensors").safe_open(path, "pt") as file:
        about = file.metadata() or {}
    if "model" in about:
        return msgspec.json.decode(about["model"], type=ModelNote)
    return ModelNote(spec=msgspec.json.decode(about["spec"], type=ModelSpec))  # of an older version


def check_packages() -> None:
    """Raise ConfigError unless what exporting needs is installed."""
    for name in ("onnx", "onnxruntime"):
        _package(name)


class _Stage(nn.Module):
    """One stage with its exit: features to (features, logits), or to logits alone."""

    def __init__(self, stage: nn.Module, head: nn.Module, is_last: bool) -> None:
        super().__init__()
        self.stage, self.head, self.is_last = stage, head, is_last

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.stage(x)
        logits: Tensor = self.head(features)
        return logits if self.is_last else (features, logits)


@torch.no_grad()
def _onnx_of(model: StagedModel, spec: ModelSpec, x: Tensor) -> tuple[bytes, list[bytes]]:
    """The whole model's ONNX and each stage's. x: (2, *input_shape)."""
    exits = [f"exit_{number}" for number in range(1, spec.exit + 1)]
    whole = _traced(model, x, exits, f"model {spec.family!r}")
    stages = []
    for number, (stage, head) in enumerate(zip(model.stages, model.exits, strict=True), 1):
        is_last = number == spec.exit
        names = ["logits"] if is_last else ["features", "logits"]
        part = _Stage(stage, head, is_last).eval()
        stages.append(_traced(part, x, names, f"stage {number} of model {spec.family!r}"))
        x = stage(x)
    return whole, stages


@contextmanager
def _exporter() -> Iterator[None]:
    """torch as the exporter wants it: transformer layers in parts instead of as one operator, which
    ONNX has not; and without the whole graph on stdout where something cannot be expressed."""
    mha: Any = getattr(torch.backends, "mha", None)  # torch 2.1 has none
    was_fast = mha.get_fastpath_enabled() if mha else False
    native: Any = torch._C
    print_graph = native._jit_onnx_log  # its switch is without effect: torch sets it itself
    if not log.isEnabledFor(logging.DEBUG):
        native._jit_onnx_log = lambda *graph: None
    if mha:
        mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        native._jit_onnx_log = print_graph
        if mha:
            mha.set_fastpath_enabled(was_fast)


def _traced(module: nn.Module, x: Tensor, outputs: Sequence[str], what: str) -> bytes:
    """ONNX with a free batch size. Raises ConfigError for what the exporter cannot express; at the
    level of debugging it has then printed its graph, which shows the author of a family where."""
    has_choice = "dynamo" in inspect.signature(torch.onnx.export).parameters  # from torch 2.5
    options: dict[str, Any] = {"dynamo": False} if has_choice else {}
    file: Any = io.BytesIO()  # newer annotations know only paths
    with warnings.catch_warnings():
        # That this exporter is the older one; that sizes and an LSTM's batch are traced. The check
        # against torch at several batch sizes is what tells whether they were traced right.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size other")
        warnings.filterwarnings("ignore", "Constant folding")  # not all of it is done here
        try:
            torch.onnx.export(
                module,
                (x,),
                file,
                input_names=["input"],
                output_names=list(outputs),
                dynamic_axes={name: {0: "n"} for name in ("input", *outputs)},
                opset_version=OPSET,
                **options,
            )
        except Exception as error:  # a user's family may hold anything
            why = f"{one_line(str(error))}; use other layers"
            raise ConfigError(f"{what} cannot be written as ONNX: {why}") from error
    content: bytes = file.getvalue()
    return content


def _checked(
    model: ExportedModel,
    whole: bytes,
    stages: Sequence[bytes],
    x: Floats | Ints,
    reference: Callable[[Any], Floats],
) -> float:
    """Largest difference of any logit, of the whole or through the stages, to `reference` (inputs
    to (exits, n, K)), over the largest logit of that exit. Raises StoreError above TOLERANCE."""
    session, engine = open_session(whole, WHOLE), _engine(model, stages)
    largest = 0.0
    for size in BATCHES:
        part = x[:size]
        wanted = reference(part)
        if not np.isfinite(wanted).all():
            raise DataError("the model gives NaN or infinite logits; nothing to export")
        rest = tuple(range(1, wanted.ndim))
        scale = np.maximum(np.abs(wanted).max(axis=rest), 1e-3)  # (exits,)
        try:
            together = np.stack(session.run(None, {"input": part}))
            got = {WHOLE: together, "the stages": engine.all_exits(part)}
            gaps = {
                name: float((np.abs(logits - wanted).max(axis=rest) / scale).max())
                for name, logits in got.items()
            }
        except EdgeError:
            raise
        except Exception as error:  # of onnxruntime, or of shapes that differ
            why = f"{one_line(str(error))}; does the model take len() of a tensor?"
            raise StoreError(f"{WHOLE} cannot be run on {len(part)} inputs: {why}") from error
        for name, gap in gaps.items():
            if not gap <= TOLERANCE:
                raise StoreError(
                    f"on {len(part)} inputs {name} differ from torch by {gap:.2g} of the largest "
                    f"logit, at most {TOLERANCE:g} is accepted; nothing was written"
                )
        largest = max(largest, *gaps.values())
    return largest


def _engine(model: ExportedModel, stages: Sequence[bytes]) -> EarlyExit:
    sessions = tuple(
        open_session(content, file.name) for content, file in zip(stages, model.stages, strict=True)
    )
    return EarlyExit(model, sessions, (NEVER,) * (len(sessions) - 1), model.metric.measures[0])


def _spread(values: Floats) -> tuple[float, ...]:
    """The standard deviation of each value (n, K); 1 where all are alike."""
    return tuple(float(found) or 1.0 for found in values.astype(np.float64).std(0))


def _inputs(spec: ModelSpec, examples: Examples | None) -> Floats | Ints:
    """(at most CHECKED, *input_shape): real inputs, else random ones."""
    if examples is None:
        rng, shape = np.random.default_rng(0), (CHECKED, *spec.input_shape)
        if spec.vocabulary:
            return rng.integers(spec.vocabulary, size=shape, dtype=np.int64)
        return rng.standard_normal(shape).astype(np.float32)
    is_other = bool(examples.vocabulary) != bool(spec.vocabulary)
    if is_other or examples.input_shape != spec.input_shape:
        wanted = f"the model takes {spec.input_shape}; give the data that it was trained for"
        raise DataError(f"data of inputs {examples.input_shape}, {wanted}")
    return examples.x[:CHECKED]


def _trained_on(examples: Examples | None, known: TrainedOn | None) -> TrainedOn:
    """What is known, else what the examples tell. Raises DataError where they are scaled unlike."""
    if examples is None:
        return known or NOT_KNOWN
    own = examples.trained_on
    if known is None:
        return own
    found = mismatch(known.scaling, own.scaling, ("the run", "the data to check it on"))
    if found and found.is_certain:
        raise DataError(found.text)
    names = known.class_names or own.class_names
    return TrainedOn(scaling=known.scaling or own.scaling, class_names=names)


def _stage_files(stages: Sequence[bytes]) -> tuple[ModelFile, ...]:
    return tuple(
        ModelFile(name=f"stage_{number}.onnx", sha256=sha256_of(content))
        for number, content in enumerate(stages, 1)
    )


def _write(model: ExportedModel, whole: bytes, stages: Sequence[bytes], folder: Path) -> None:
    with new_folder(folder) as draft:
        files = zip((model.whole, *model.stages), (whole, *stages), strict=True)
        for file, content in files:
            write_file(draft / file.name, content)
        write_struct(draft / MODEL, model)


def _batch_norms(content: bytes) -> int:
    """How many BatchNormalization nodes an ONNX graph has."""
    nodes = _package("onnx").load_from_string(content).graph.node
    return sum(node.op_type == "BatchNormalization" for node in nodes)


def _outputs_only(content: bytes, outputs: Sequence[str]) -> bytes:
    """The ONNX graph without what only other outputs need."""
    onnx = _package("onnx")
    extractor = importlib.import_module("onnx.utils").Extractor(onnx.load_from_string(content))
    made: bytes = extractor.extract_model(["input"], list(outputs)).SerializeToString()
    return made


def _package(name: str) -> Any:
    return optional_module(name, "exporting", "export")
