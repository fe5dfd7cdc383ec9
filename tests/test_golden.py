"""The wire's bytes and its description stay as they are: golden files and docs/protocol*.md.

A golden file is one control frame, an example with every field set to something other than its
default. After a deliberate change of a message raise PROTOCOL, run

    python -m tests.test_golden

which writes the files anew, then python -m tools.conformance --write-vectors, and bring the tables
of docs/protocol-messages.md up to date; the tests say what lacks.
"""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from msgspec import inspect
from msgspec.structs import fields

import edge_sdk
from coordinator.admission import join as joining
from coordinator.fleet import cohort, flow_control, job_phases, jobs, open_job, patience, sessions
from coordinator.links import rate_limit, router
from edge_sdk.agent import agent, conduct, job_watch, state, trainer_process
from edge_sdk.capacity import chooser
from edge_sdk.data import examples
from edge_sdk.errors import EdgeError
from edge_sdk.protocol import codec, join, link, messages, stream
from edge_sdk.protocol import fields as wire_fields
from edge_sdk.protocol.codec import decode, encode
from edge_sdk.protocol.fields import ITEM_BYTES, PLAIN_TEXT
from edge_sdk.protocol.messages import Fetch, Message
from edge_sdk.protocol.tensors import DTYPES
from edge_sdk.training import segment, worker
from tests.support.golden_messages import EXAMPLES

GOLDEN = Path(__file__).parent / "golden"
TYPES = typing.get_args(Message)
# What a peer sees of every module's constants, a table of docs/protocol-coordinator.md.
CONSTANTS: dict[ModuleType, tuple[str, ...]] = {
    messages: ("PROTOCOL", "MAX_FRAME_BYTES", "MAX_TENSORS"),
    wire_fields: ("MAX_LINE",),
    codec: ("MAX_CONTROL_BYTES",),
    stream: ("PART_BYTES", "MAX_TRANSFER_BYTES", "ALIGNMENT"),
    link: ("PING_MS", "PING_TIMEOUT_MS", "DEAD_MS", "HIGH_WATER"),
    state: ("HELLO_S", "HELLO_MAX_S", "REFUSED_S", "REFUSED_MAX_S", "LEAST_HEARTBEAT_S"),
    trainer_process: ("RESTART_S", "RESTART_MAX_S"),
    chooser: ("GROWN",),
    worker: ("WINDOW",),
    conduct: ("CREDIT", "CREDIT_PER_S"),
    job_watch: ("TIMES", "LEAST_S", "UNPREDICTED_S"),
    rate_limit: ("BURST", "RATE", "MOST_DROPPED", "MOST_REFUSED", "OUT_S"),
    patience: ("IDLE_S", "SLOWER"),
    examples: ("MIN_BATCH",),
    join: ("CONNECT_S", "ANSWER_S", "AGAIN_S"),
    cohort: ("HEARTBEAT_S", "FAREWELL_S"),
    sessions: ("SILENCE_S", "PROBE_S"),
    jobs: ("RESEND_S", "MOST_GIVEN", "MOST_STALLS"),
    open_job: ("MOST_WANTED",),
    flow_control: (
        "BUDGET_BYTES",
        "WINDOW",
        "SLOW_WINDOW",
        "SLOW_RATE",
        "UNKNOWN_RATE",
        "PATIENCE",
        "LINK_S",
    ),
}


def tag(kind: type) -> str:
    return str(kind.__struct_config__.tag)


def golden(kind: type) -> Path:
    return GOLDEN / f"{tag(kind)}.msgpack"


def write_golden() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for example in EXAMPLES:
        golden(type(example)).write_bytes(encode(example))


# -- golden files ------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: tag(type(example)))
def test_bytes_stay_as_they_are(example):
    data = golden(type(example)).read_bytes()
    assert encode(example) == data
    assert decode(data) == example


def test_every_message_type_has_one_example_and_one_file():
    assert sorted(map(tag, map(type, EXAMPLES))) == sorted(map(tag, TYPES))
    assert {path.name for path in GOLDEN.iterdir()} == {golden(kind).name for kind in TYPES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: tag(type(example)))
def test_examples_leave_no_field_at_its_default(example):
    left = [f.name for f in fields(example) if getattr(example, f.name) == default_of(f)]
    assert not left


# -- docs/protocol*.md --------------------------------------------------------------------------


def test_the_version_is_the_same_wherever_it_stands(text):
    said = re.findall(r"`protocol` (?:is not|\| int \| required \|) (\d+)", text)
    assert said == [str(messages.PROTOCOL)] * 4


@pytest.fixture(scope="module")
def text() -> str:
    """The device's page, the messages', and the coordinator's."""
    folder = Path(edge_sdk.__file__).parent.parent / "docs"
    pages = ("protocol.md", "protocol-messages.md", "protocol-coordinator.md")
    return "\n".join((folder / page).read_text(encoding="utf-8") for page in pages)


def section(text: str, title: str) -> str:
    """What stands under the heading ## `title`, up to the next heading."""
    found = re.search(rf"^## `{re.escape(title)}`.*?\n(.*?)(?=^#{{1,3}} |\Z)", text, re.M | re.S)
    assert found, f"docs/protocol-messages.md has no section ## `{title}`"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Cells of the table rows whose first cell is one name in backticks."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def reachable() -> list[type]:
    """The message types and every struct that their fields lead to, each once."""
    found: list[type] = []

    def visit(info: Any) -> None:
        if isinstance(info, inspect.StructType):
            if info.cls in found:
                return
            found.append(info.cls)
            for field in info.fields:
                visit(field.type)
        for name in ("types", "item_types"):
            for inner in getattr(info, name, ()):
                visit(inner)
        for name in ("item_type", "key_type", "value_type"):
            if hasattr(info, name):
                visit(getattr(info, name))

    visit(inspect.type_info(Message))
    return found


def number(value: float) -> str:
    exponent = int(value).bit_length() - 1
    if isinstance(value, int) and value >= 2**20 and value == 2**exponent:
        return f"2^{exponent}"
    return str(value)


def spread(info: Any) -> str:
    """ "", or the range of a number as docs/protocol.md writes it."""
    low = number(info.ge) if info.ge is not None else ""
    low = f"above {number(info.gt)}" if info.gt is not None else low
    high = number(info.le) if info.le is not None else ""
    high = f"below {number(info.lt)}" if info.lt is not None else high
    if low and high:
        return f", {low} to {high}"
    if low:
        return f", {low}" if low.startswith("above") else f", {low} or more"
    assert not high, "a range without a lower end; say how docs/protocol.md writes it"
    return ""


def lengths(info: Any, unit: str) -> str:
    low, high = info.min_length, info.max_length
    if low is None and high is None:
        return ""
    return f", at most {high} {unit}" if low is None else f", {low} to {high} {unit}"


def type_text(info: Any) -> str:
    """A field's type as docs/protocol.md writes it."""
    if isinstance(info, inspect.StructType):
        return f"`{info.cls.__name__}`"
    if isinstance(info, inspect.LiteralType):
        return "one of " + ", ".join(f"`{value}`" for value in info.values)
    if isinstance(info, inspect.UnionType):
        names = [type_text(inner) for inner in info.types]
        return " or ".join(f"({name})" if "," in name else name for name in names)
    if isinstance(info, inspect.VarTupleType):
        return f"array of ({type_text(info.item_type)}){lengths(info, 'items')}"
    if isinstance(info, inspect.DictType):
        pair = f"({type_text(info.key_type)}) to ({type_text(info.value_type)})"
        return f"map of {pair}{lengths(info, 'pairs')}"
    if isinstance(info, inspect.StrType):
        special = f", matches `{info.pattern}`" if info.pattern else ", any text"
        special = "" if info.pattern == PLAIN_TEXT else special
        return "str" + lengths(info, "characters") + special
    if isinstance(info, inspect.IntType | inspect.FloatType):
        return ("int" if isinstance(info, inspect.IntType) else "float") + spread(info)
    plain = {inspect.BoolType: "bool", inspect.NoneType: "nil"}
    return plain[type(info)]


def default_of(field: Any) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def default_text(field: Any) -> str:
    if field.required:
        return "required"
    value = default_of(field)
    return "`nil`" if value is None else f"`{json.dumps(msgspec.to_builtins(value))}`"


@pytest.mark.parametrize("kind", reachable(), ids=lambda kind: kind.__name__)
def test_protocol_lists_every_field_with_its_type_and_default(text, kind):
    title = tag(kind) if kind in TYPES else kind.__name__
    described = rows(section(text, title))
    wanted = [
        [f"`{field.name}`", type_text(field.type), default_text(field)]
        for field in inspect.type_info(kind).fields
    ]
    assert [row[:3] for row in described] == wanted
    assert all(len(row) == 4 and row[3] for row in described), "a field without its meaning"


def test_protocol_gives_every_constant_and_its_value(text):
    table = {row[0].strip("`"): row[1] for row in rows(text)}
    for module, names in CONSTANTS.items():
        owner = module.__name__.rpartition(".")[2]
        for name in names:
            assert table.get(f"{owner}.{name}") == str(getattr(module, name)), f"{owner}.{name}"


def test_protocol_names_every_fault_code(text):
    never_sent = {"link", "store", "quorum", "export"}
    kinds = EdgeError.__subclasses__()
    kinds += [below for kind in kinds for below in kind.__subclasses__()]
    codes = {kind.code for kind in kinds} - never_sent
    codes |= {"version", segment.Cancelled.code, *agent.FATAL}
    sent = set()
    # Fault(code="..."), _fault(name, "..."), _answer(name, "...")
    for module in (cohort, jobs, sessions, router, joining, agent):
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        call = r'(?:Fault\(code=|(?:_fault|_answer|_fail_job|\.refuse)\(\s*(?:[\w.]+, )?)"(\w+)"'
        sent |= set(re.findall(call, source))
    assert {"hello", "round", "late", "stalled", "duplicate", "admission", "trainer"} <= sent
    codes |= sent
    faults = text.partition("## 8. Faults\n")[2].partition("\n## ")[0]
    table = {row[0].strip("`") for row in rows(faults)}
    assert codes <= table, f"no row for {codes - table}"


def test_protocol_gives_every_dtype_and_its_size(text):
    assert list(ITEM_BYTES) == list(DTYPES)
    table = {row[0].strip("`"): row[1] for row in rows(text) if len(row) > 1}
    assert {name: table.get(name) for name in DTYPES} == {
        name: str(size) for name, size in ITEM_BYTES.items()
    }


def test_protocol_gives_the_phases_of_an_open_job(text):
    head = f"| event | {' | '.join(phase.value for phase in job_phases.OPEN)} |"
    _, _, below = text.partition(f"{head}\n")
    lines = below.partition("\n\n")[0].splitlines()[1:]
    said = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert said == [
        [event.value, *(to.value if to else "" for to in row)]
        for event, row in job_phases.TABLE.items()
    ]


def test_protocol_works_the_fetch_example_in_hex(text):
    assert golden(Fetch).read_bytes().hex(" ") in text


if __name__ == "__main__":
    write_golden()
