"""What the fields of messages and records hold: types with ranges and lengths."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

MAX_LINE = 2000  # characters

# What a message may hold as text: no control characters, no line or paragraph separators.
PLAIN_TEXT = r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"
Text: TypeAlias = Annotated[str, Meta(max_length=200, pattern=PLAIN_TEXT)]
Bytes: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
Bound: TypeAlias = Literal["host", "cgroup", "cap"]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**48)]
Index: TypeAlias = Annotated[int, Meta(ge=1, le=2**31)]
JobInHand: TypeAlias = Annotated[int, Meta(ge=0, le=2**31)]  # its round, 0: none
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=10**9)]
Factor: TypeAlias = Annotated[float, Meta(ge=0, le=10**6)]
JobId: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Digest: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200, pattern=PLAIN_TEXT)]
CLIENT_NAME = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
CLIENT_NAME_IN_WORDS = "1 to 64 letters, digits, dots, - or _"
ClientId: TypeAlias = Annotated[str, Meta(pattern=CLIENT_NAME)]
# A CURVE key as Z85 text; keys.check_key knows which of these are numbers of 32 bytes.
CURVE_KEY = r"\A[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}\Z"
CurveKey: TypeAlias = Annotated[str, Meta(pattern=CURVE_KEY)]
Line: TypeAlias = Annotated[str, Meta(max_length=MAX_LINE, pattern=PLAIN_TEXT)]
# A model input, float32; NaN and infinity are in no range.
Input: TypeAlias = Annotated[float, Meta(ge=-3.5e38, le=3.5e38)]
InputShape: TypeAlias = Annotated[tuple[Index, ...], Meta(min_length=1, max_length=4)]
# The text has no pattern: msgspec 0.22 frees what is not its own when it drops a type that joins a
# str with a pattern and an array. Families quote options by their repr.
Option: TypeAlias = (
    int
    | Annotated[float, Meta(ge=-(10**9), le=10**9)]
    | Annotated[str, Meta(max_length=MAX_LINE)]
    | bool
    | Annotated[tuple[int, ...], Meta(max_length=100)]
)
# What a tensor of a transfer is. A "weight" has the model's name for it, any other is "ROLE/NAME".
# packed: the values of a weight under its mask. flat: all parameters, one after another.
Role: TypeAlias = Literal["weight", "packed", "mask", "correction", "teacher", "initial", "flat"]
Distill: TypeAlias = Literal[
    "none", "deep-to-shallow", "deepest-to-shallow", "shallow-to-deep", "mutual"
]
Scaler: TypeAlias = Literal["none", "training", "always"]
Task: TypeAlias = Literal["classify", "multilabel", "regress", "tokens"]
MAX_OUTPUTS = 1_000_000
# Of how sure an exit is of an answer, see tasks/.
Measure: TypeAlias = Literal["softmax", "entropy", "sigmoid", "agreement"]
Vocabulary: TypeAlias = Annotated[int, Meta(ge=0, le=10_000_000)]  # token ids; 0: floats
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Figure: TypeAlias = Annotated[float, Meta(ge=0, le=3.5e38)]  # finite
Dtype: TypeAlias = Literal["float32", "float64", "float16", "int64", "int32", "uint8", "bool"]
ITEM_BYTES: dict[str, int] = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Immutable record with checked fields."""


class Adapters(Struct, frozen=True, kw_only=True):
    """Small trained parts beside the layers of a frozen model (edge_sdk/models/adapters/): of the
    modules whose names match one of `targets`, (): that the kind chooses, in stages from `first`
    on. branches: of dema, whose outputs are weighed."""

    kind: Name
    rank: Annotated[int, Meta(ge=1, le=4096)] = 8
    branches: Annotated[int, Meta(ge=1, le=64)] = 1
    targets: Annotated[tuple[Name, ...], Meta(max_length=20)] = ()
    first: Annotated[int, Meta(ge=1, le=100)] = 1
