"""What inputs and labels mean: one rule for each of layout, scaling and class names, for whatever
brings data in. Of shapes, numbers and names only, so that an agent, which holds no array, keeps to
the same rules. docs/data.md tells them."""

from __future__ import annotations

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast

from edge_sdk.helpers.text import bad as bad
from edge_sdk.protocol.fields import PLAIN_TEXT, Struct, Task
from edge_sdk.protocol.messages import (
    InputScaling,
    ModelSpec,
    Welcome,
)
from edge_sdk.tasks.metrics import METRICS, NAMES_STEP

Shape: TypeAlias = tuple[int, ...]
LAYOUTS = {"features": "(n, F)", "series": "(n, C, window)", "images": "(n, C, H, W)"}
AXES = {2: "features", 3: "series", 4: "images"}  # by the number of axes, n among them
FEW_CHANNELS = 12  # a series of more is long, else it may be rows of an image
LONG = 4  # times its channels
MOST_NAME = 200  # characters of a class's name
MOST_INPUT = 1e15  # beyond it lie marks of missing values (1e20, 9.97e36), never scaled inputs
# Of the wider of two ranges, the share that both have. Pixels at 0..1 beside -1..1 have half.
SHARED = 0.5
FAR = 100.0  # times as wide: no other devices' data of one kind, but other units (0..255 by 0..1)
FAR_INTEGERS = 8.0  # times as wide, by one rule: 0..16 beside 0..255 are no dark pictures


# -- layout ----------------------------------------------------------------------------------------


def laid_out(shape: Shape, layout: str | None, where: str) -> Shape:
    """The shape (n, *input_shape) that x of this shape is read as, whatever its type. layout: one
    of LAYOUTS, which also adds the channel axis that images or a series lack; None: by the number
    of axes, if that means one thing. Raises DataError, which tells how to turn x."""
    if layout is not None and layout not in LAYOUTS:
        raise bad(where, f"layout {layout!r}", f"one of {', '.join(LAYOUTS)}", "name one of them")
    axes = len(shape)
    if layout is None:
        return _unmistakable(shape, where)
    if AXES.get(axes) == layout:
        return shape
    if AXES.get(axes + 1) == layout != "features":
        return (shape[0], 1, *shape[1:])
    raise bad(where, f"x of shape {shape}, layout {layout!r}", LAYOUTS[layout], "reshape x")


def _unmistakable(shape: Shape, where: str) -> Shape:
    got = f"x of shape {shape}"
    if len(shape) not in AXES:
        raise bad(where, got, f"{', '.join(LAYOUTS.values())}", "reshape x")
    if len(shape) == 3:
        _, channels, window = shape
        is_long = channels <= FEW_CHANNELS or window >= LONG * channels
        if channels > 1 and (channels >= window or not is_long):
            raise bad(
                where,
                f"{got}, which may be images without a channel axis or a series of {channels} "
                "channels",
                "(n, C, H, W) or (n, C, window)",
                "for images give x[:, None], for (n, window, C) x.transpose(0, 2, 1), else say "
                'layout "series"',
            )
    if len(shape) == 4:
        _, first, second, last = shape
        if last < min(first, second) and (first > LONG or first == second):
            raise bad(
                where,
                f"{got}, which looks like (n, H, W, C)",
                "(n, C, H, W)",
                f'give x.transpose(0, 3, 1, 2), or say layout "images" if there are {first} '
                "channels",
            )
    return shape


# -- scaling ---------------------------------------------------------------------------------------


class TrainedOn(Struct, frozen=True, kw_only=True):
    """What goes with a trained model of the data that it is for. None, (): not known."""

    scaling: InputScaling | None = None
    class_names: tuple[str, ...] = ()


NOT_KNOWN = TrainedOn()


class ModelNote(Struct, frozen=True, kw_only=True):
    """What a model.safetensors says of itself, as JSON under one key: the order of several is a
    matter of chance in such a file, and one run gives the same bytes each time."""

    spec: ModelSpec
    data: TrainedOn | None = None


@dataclass(frozen=True)
class Mismatch:
    """Data that differ, in a sentence. is_certain: no data of one kind are so far apart."""

    text: str
    is_certain: bool


def scaling_of(
    low: float, high: float, rule: tuple[float, float] | None, made_of: str = ""
) -> InputScaling:
    """rule: (divisor, offset) of integers, None: floats. The range is told in three digits."""
    low, high = float(f"{low:.3g}"), float(f"{high:.3g}")
    divisor, offset = rule or (None, 0.0)
    return InputScaling(low=low, high=high, divisor=divisor, offset=offset, made_of=made_of)


def described(scaling: InputScaling) -> str:
    """In words, e.g. "integers / 127.5 - 1", "floats as given, 0 to 255"."""
    if scaling.divisor is None:
        return f"floats as given, {scaling.low:g} to {scaling.high:g}"
    return f"integers / {scaling.divisor:g} - {scaling.offset:g}"


def integers(scaling: InputScaling) -> str:
    """The range of the integers that such inputs were made of, e.g. "0 to 255"."""
    divisor, offset = scaling.divisor or 1.0, scaling.offset
    return " to ".join(f"{round((v + offset) * divisor)}" for v in (scaling.low, scaling.high))


def mismatch(
    reference: InputScaling | None, other: InputScaling | None, names: tuple[str, str]
) -> Mismatch | None:
    """How the inputs of `other` were made or scaled unlike those of `reference`; None: as far as
    can be told they were not, or one of them is not known. names: whose they are, in that order.

    Two rules for integers are one or differ; by one rule a range FAR_INTEGERS times as wide is a
    doubt. Floats beside integers, and floats beside floats, are
    compared by their ranges: floats that were scaled by hand by the same rule share more than half
    of the range, or, if few or dark, lie within it and reach into its lower half. Floats within
    other floats are legitimate, as clients differ, but for a range FAR wider than the
    reference's."""
    if reference is None or other is None:
        return None
    if reference.made_of and other.made_of not in ("", reference.made_of):
        text = (
            f"the inputs of {names[0]} are {reference.made_of}, those of {names[1]} "
            f"{other.made_of}; make both alike: columns, their order and ranges (data.toml)"
        )
        return Mismatch(text, True)
    widths = reference.high - reference.low, other.high - other.low
    both = min(reference.high, other.high) - max(reference.low, other.low)
    is_apart = both <= SHARED * max(widths)
    if reference.divisor is not None and _rule(reference) == _rule(other):
        if min(widths) <= 0 or FAR_INTEGERS * min(widths) > max(widths):
            return None
        text = (
            f"the integers of {names[0]} are {integers(reference)}, those of {names[1]} "
            f"{integers(other)}; are they of one kind? Give both on one scale"
        )
        return Mismatch(text, False)
    if reference.divisor is not None and other.divisor is not None:
        is_other = is_certain = True
    elif min(widths) <= 0:  # constant inputs tell nothing
        is_other = is_certain = False
    elif reference.divisor is None and other.divisor is None:
        is_other, is_certain = is_apart, widths[1] >= FAR * widths[0]
    else:
        whole, floats = sorted((reference, other), key=lambda one: one.divisor is None)
        is_part = (
            whole.low <= floats.low < (whole.low + whole.high) / 2 and floats.high <= whole.high
        )
        is_other, is_certain = True, is_apart and not is_part
    if not is_other:
        return None
    step = "scale both alike, by the same constants"
    if None in (reference.divisor, other.divisor) and reference.divisor != other.divisor:
        step = "give the same integers on both sides, or `scaling` with floats made by that rule"
    text = (
        f"the inputs of {names[0]} are {described(reference)}, those of {names[1]} "
        f"{described(other)}; {step}"
    )
    return Mismatch(text, is_certain)


def unlike_integers(reference: InputScaling | None, low: float, high: float) -> Mismatch | None:
    """How integers, scaled by a model's rule to this range, are unlike those that trained it. They
    may be a few and dark, so a narrower range is a doubt only."""
    if reference is None or not (reference.low < reference.high and low < high):
        return None
    own = scaling_of(low, high, (reference.divisor or 1.0, reference.offset))
    width = FAR_INTEGERS * (reference.high - reference.low)
    is_certain = high > reference.low + width
    is_narrow = FAR_INTEGERS * (high - reference.low) <= reference.high - reference.low
    if not is_narrow and high <= reference.high + 2 * (reference.high - reference.low):
        return None
    text = (
        f"the inputs are integers, {integers(own)}; those that trained the model were "
        f"{integers(reference)}, {described(reference)}; give them on that scale"
    )
    return Mismatch(text, is_certain)


def unlike_model(reference: InputScaling | None, low: float, high: float) -> Mismatch | None:
    """How float inputs of this range were scaled unlike those that trained a model. They may be a
    few, so only a wider range is certain; those of integers that stay in its upper half are a
    doubt."""
    if reference is None or reference.low >= reference.high:
        return None
    is_integers = reference.divisor is not None
    margin = (2 if is_integers else FAR) * (reference.high - reference.low)
    is_certain = low < reference.low - margin or high > reference.high + margin
    if not is_certain and not (is_integers and low >= (reference.low + reference.high) / 2 < high):
        return None
    text = (
        f"the inputs are floats, {low:.3g} to {high:.3g}; those that trained the model were "
        f"{described(reference)}, {reference.low:g} to {reference.high:g}; scale them likewise"
    )
    return Mismatch(text, is_certain)


class DataTold(Protocol):
    """What a device says of its data."""

    @property
    def input_shape(self) -> Shape: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def task(self) -> Task: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def scaling(self) -> InputScaling | None: ...
    @property
    def class_names(self) -> str | None: ...


def has_room(told: DataTold, model: ModelSpec) -> bool:
    """Whether the model has an output for all that data of its task have. They may lack classes,
    not columns of y."""
    if METRICS[model.task].is_by_column:
        return told.num_classes == model.num_classes
    return told.num_classes <= model.num_classes


def misfit(told: DataTold, model: ModelSpec) -> str:
    """Why data cannot train a model; "" where they can."""
    words = METRICS[model.task].outputs
    if told.task != model.task:
        return f"its labels are for the task {told.task}, this run's is {model.task}"
    if bool(told.vocabulary) != bool(model.vocabulary) or told.vocabulary > model.vocabulary:
        its, wanted = (
            f"token ids below {v}" if v else "numbers" for v in (told.vocabulary, model.vocabulary)
        )
        return f"its inputs are {its}, this run's {wanted}"
    if told.input_shape == model.input_shape and has_room(told, model):
        return ""
    text = (
        f"its examples are {told.input_shape} with {told.num_classes} {words}, this run "
        f"trains on {model.input_shape} with {model.num_classes}"
    )
    if told.num_classes == model.num_classes + 1 and model.task == "classify":
        text += "; if its labels run from 1, give y - 1"
    return text


def unlike_run(
    told: DataTold, welcome: Welcome, name: str, class_names: Sequence[str] = ()
) -> Mismatch | None:
    """How a device's data differ from what a run trains on, as both sides find out. name: the
    device's, in the sentence. class_names: the run's, where they are known."""
    if text := misfit(told, welcome.model):
        return Mismatch(text, True)
    names = {told.class_names, welcome.class_names} - {None}
    if len(names) > 1:
        whose = f", which are {listed(class_names, 20)}" if class_names else ""
        text = f"the class_names of {name} are not this run's{whose}"
        step = "give the same names in the same order, with those that it has no example of"
        return Mismatch(f"{text}; {step} (classes in data.toml)", True)
    return mismatch(welcome.scaling, told.scaling, ("this run", name))


def _rule(scaling: InputScaling) -> tuple[float | None, float]:
    return scaling.divisor, scaling.offset


# -- labels ----------------------------------------------------------------------------------------


def checked_names(names: object, where: str) -> tuple[str, ...]:
    """The classes' names, a list, tuple or array in the order of their labels. Raises DataError:
    also for a set or dict, whose order says nothing of labels."""
    wanted = "a different name for each class, text on one line"
    is_array = hasattr(names, "__array__") and getattr(names, "ndim", 1) == 1
    if isinstance(names, str | bytes) or not (isinstance(names, Sequence) or is_array):
        got = f"class_names {names!r:.60} of type {type(names).__name__}"
        raise bad(where, got, "a list of names", "give a list, in the order of the labels")
    names = tuple(cast(Iterable[object], names))
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME:
            raise bad(where, f"class_names with {name!r:.60}", wanted)
        is_utf_8 = name.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in name)
        if not is_utf_8 or not re.match(PLAIN_TEXT, name):
            raise bad(where, f"class_names with {name!r:.60}", wanted)
    found = tuple(map(str, names))
    if twice := sorted(name for name, count in Counter(found).items() if count > 1):
        raise bad(where, f"class_names with {twice[0]!r} more than once", wanted)
    return found


def names_digest(names: Sequence[str]) -> str | None:
    """Of the names in their order, as `Hello` tells it; None for none."""
    text = "".join(f"{name}\n" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:32] if names else None


def label_of(label: object, names: Sequence[str], where: str) -> int:
    """A label as a number from 0, that of its name where it is a text. Raises DataError."""
    if isinstance(label, str):
        if not names:
            raise bad(where, f"the label {label!r:.60}", "an integer", NAMES_STEP)
        if label not in names:
            known = f"one of class_names, {listed(names)}"
            raise bad(where, f"the label {label!r:.60}", known)
        return names.index(label)
    if type(label).__name__ in ("bool", "bool_"):
        raise bad(where, f"the label {label}", "an integer", "give int(label)")
    try:
        return operator.index(label)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        dtype = getattr(label, "dtype", None)
        of_dtype = f" of {dtype}" if dtype is not None else ""
        got = f"a label of type {type(label).__name__}{of_dtype}"
        step = "give labels.long()" if type(label).__module__ == "torch" else "give int(label)"
        raise bad(where, got, "an integer, or one of class_names", step) from error


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def from_one(lowest: int, highest: int, num_classes: int) -> str:
    """What to say of labels that seem to count from 1; "" for others."""
    if lowest != 1 or highest < num_classes - 1:
        return ""
    return (
        f"labels run from 1 to {highest} and none is 0; if the classes are counted from 1, give "
        "y - 1: labels are 0 to the number of classes less one, as on every other device"
    )
