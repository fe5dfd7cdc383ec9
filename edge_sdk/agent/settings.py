"""The settings of `edge-sdk run` as a file, by default the service's /etc/edge-sdk/config.toml.

The keys are the flags' names with _ for -. A flag on the command line wins over the file. Whatever
is wrong with a file becomes one line: file, line, key, what it says, what is expected."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edge_sdk.agent.own_model import OwnModel
from edge_sdk.errors import ConfigError
from edge_sdk.helpers import toml
from edge_sdk.helpers.files import mode_of, read_user_text, why_not, write_whole
from edge_sdk.helpers.text import checked_endpoint, parse_option, parse_size
from edge_sdk.protocol.fields import CLIENT_NAME, CLIENT_NAME_IN_WORDS, CURVE_KEY

DEFAULT_CONFIG = Path("/etc/edge-sdk/config.toml")
# What an error says is expected; also every key there is.
EXPECTED = {
    "coordinator": "the coordinator's address, tcp://HOST:PORT, an IPv6 address in brackets",
    "data": "the absolute path of this device's data, or the name of a data set",
    "id": f"a name of {CLIENT_NAME_IN_WORDS}",
    "keys": "the absolute path of the folder of keys",
    "server_key": "the coordinator's public key, or the absolute path of its file",
    "insecure": "true or false",
    "memory_cap": 'a size such as "512M" or "1.5G", powers of 1024',
    "threads": "a number from 0 (all cores) to 1024",
    "device": '"cpu" or "cuda"',
    "ignore_conditions": "true or false",
    "import": 'a list of module names such as ["my_models"]',
    "augment": 'a function as MODULE:FUNCTION, e.g. "my_transforms:flip"',
    "model": 'a family of models, e.g. "cnn"',
    "exits": "a number from 1 to 100",
    "option": 'a list of KEY=VALUE such as ["channels=16,32"]',
}
Name = Annotated[str, Meta(min_length=1)]
MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
FUNCTION = rf"\A{MODULE}:[^\W\d]\w*\Z"
Module = Annotated[str, Meta(pattern=rf"\A{MODULE}\Z")]
FilePath = Annotated[str, Meta(pattern=r"\A/")]


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a config file may say. None: nothing of it. memory_cap is a size such as "512M"."""

    coordinator: Name | None = None
    data: Annotated[str, Meta(pattern=r"\A(/.*|[^/]+)\Z")] | None = None
    id: Annotated[str, Meta(pattern=CLIENT_NAME)] | None = None
    keys: FilePath | None = None
    server_key: Annotated[str, Meta(pattern=rf"\A/.*\Z|{CURVE_KEY}")] | None = None
    insecure: bool | None = None
    memory_cap: str | None = None
    threads: Annotated[int, Meta(ge=0, le=1024)] | None = None
    device: Annotated[str, Meta(pattern=r"\A(cpu|cuda(:[0-9]+)?)\Z")] | None = None
    ignore_conditions: bool | None = None
    imports: tuple[Module, ...] | None = msgspec.field(default=None, name="import")
    augment: Annotated[str, Meta(pattern=FUNCTION)] | None = None
    model: Name | None = None
    exits: Annotated[int, Meta(ge=1, le=100)] | None = None
    option: tuple[Annotated[str, Meta(pattern=r"\A[^=]+=.")], ...] | None = None

    @property
    def cap_bytes(self) -> int | None:
        return None if self.memory_cap is None else parse_size(self.memory_cap)

    def given(self) -> dict[str, Any]:
        """What the file sets, by the names of RunSettings and with sizes in bytes."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        values["memory_cap"] = self.cap_bytes
        if self.option is not None:
            values["option"] = tuple(map(parse_option, self.option))
        return {name: value for name, value in values.items() if value is not None}


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a device runs with. None: not set, and there is no default. memory_cap: bytes."""

    coordinator: str | None = None
    data: str | None = None
    id: str | None = None
    keys: Path
    server_key: str | None = None
    insecure: bool = False
    memory_cap: int | None = None
    threads: int = 0
    device: str = "cpu"
    ignore_conditions: bool = False
    imports: tuple[str, ...] = ()
    augment: str | None = None
    model: str | None = None  # family of a model of the device's own, its exits and options
    exits: int = 1
    option: tuple[tuple[str, Any], ...] = ()

    @property
    def own_model(self) -> OwnModel | None:
        """Raises ConfigError for what no model has."""
        if self.model is None and (self.exits > 1 or self.option):
            raise ConfigError("exits and option are of a model of this device's own; set model too")
        if self.model is None:
            return None
        told = {"family": self.model, "exits": self.exits, "options": dict(self.option)}
        try:
            return msgspec.convert(told, OwnModel)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the device's own model (--model, --option): {error}") from error


def settled(
    config: Path | None, flags: Mapping[str, Any], default_keys: Callable[[], Path]
) -> RunSettings:
    """Each setting from the flag of its name where that was given (is not None), else from the
    config file, else the default. default_keys: asked where neither names a folder. Raises
    ConfigError for the file."""
    given = read_config(config).given() if config else {}
    given |= {name: value for name, value in flags.items() if value is not None}
    imports, keys = tuple(given.pop("imports", ())), given.pop("keys", None)
    try:
        folder = Path(keys or default_keys())
    except ConfigError:
        if not given.get("insecure"):
            raise
        folder = Path(os.devnull)  # of which nobody reads
    return RunSettings(keys=folder, imports=imports, **given)


def read_config(path: Path) -> Settings:
    """The settings of a file. Raises ConfigError: unreadable, no TOML, or a value not allowed."""
    try:
        text = read_user_text(path)
    except OSError as error:
        raise ConfigError(
            f"config file {path} cannot be read: {error.strerror}; "
            "name the one there is by --config, or let `edge-sdk join LINE` or, for a service, "
            "`edge-sdk service install` write one"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text: {error}") from error
    return parse_config(text, str(path))


def parse_config(text: str, where: str) -> Settings:
    """The settings of a file's text; `where` names the file in errors. Raises ConfigError."""
    raw = _parse_toml(text, where)
    for key, value in raw.items():
        if isinstance(value, dict | list) and (section := _section(text, key)):
            said = f"sections are not used; remove the line {section[1]}"
            raise ConfigError(f"{where}, line {section[0]}: {said}")
        if key not in EXPECTED:
            close = difflib.get_close_matches(key.lower(), EXPECTED, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(EXPECTED)}"
            raise ConfigError(f"{_place(text, where, key)}: there is no such key; {hint}")
        check_value(key, value, _place(text, where, key))
    return msgspec.convert(raw, Settings)


def with_values(text: str, values: Mapping[str, str | bool], where: str) -> str:
    """The file's text with these keys set where they stood, and all else as it was. Raises
    ConfigError if these lines cannot be changed by a program."""
    lines = text.splitlines()
    for key, value in values.items():
        name = rf"[\"']?{re.escape(key)}[\"']?\s*="
        places = [n for n, line in enumerate(lines) if re.match(rf"\s*{name}", line)]
        places += [n for n, line in enumerate(lines) if re.match(rf"#\s*{name}", line)]
        said = f"{key} = {json.dumps(value, ensure_ascii=False)}"
        if places:
            lines[places[0]] = said
        else:
            lines.append(said)
    changed = "\n".join([*lines, ""])
    try:
        settings = parse_config(changed, where)
        is_right = all(getattr(settings, key) == value for key, value in values.items())
    except ConfigError:
        is_right = False
    if not is_right:  # a value of several lines, or one that no line of TOML holds
        wanted = ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
        raise ConfigError(f"{where} cannot be changed by a program; set in it {wanted}")
    return changed


def template() -> str:
    """The text of a config file to begin with: every key in a comment that explains it."""
    return Path(__file__).with_name("config.toml.in").read_text(encoding="utf-8")


def write_config(path: Path, text: str) -> None:
    """Whole or not at all, in the old file's mode, else readable by all. Raises ConfigError."""
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text, mode=mode_of(path, 0o644))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be written: {why_not(error)}") from error


def default_config(own_folder: Callable[[], Path]) -> Path:
    """The service's config file where this user may change it, else one in `own_folder`."""
    if os.access(DEFAULT_CONFIG, os.W_OK):
        return DEFAULT_CONFIG
    return own_folder() / DEFAULT_CONFIG.name


def check_value(key: str, value: object, place: str) -> None:
    """Raise ConfigError, which begins with `place`, unless the value is allowed for this key."""
    try:
        settings = msgspec.convert({key: value}, Settings)
        if settings.coordinator is not None:
            checked_endpoint(settings.coordinator, key)
        elif settings.memory_cap is not None:
            parse_size(settings.memory_cap)
        elif settings.option is not None:
            settings.given()
    except (msgspec.ValidationError, ConfigError) as error:
        raise ConfigError(f"{place}: got {_shown(value)}, expected {EXPECTED[key]}") from error


def _parse_toml(text: str, where: str) -> dict[str, Any]:
    try:
        return toml.loads(text)
    except toml.TOMLDecodeError as error:  # its message ends with "(at line 3, column 5)"
        words = str(error)
        line = re.search(r"line (\d+)", words)
        number = int(line[1]) if line else text.count("\n") + 1  # "(at end of document)"
        what = re.sub(r" \(at .*\)", "", words)
        lines = text.splitlines()
        said = lines[number - 1].strip() if number <= len(lines) else "the end of the file"
        raise ConfigError(
            f"{where}, line {number}: {what} in {_shown(said)}; a line is KEY = VALUE, and text "
            'stands in "quotes"'
        ) from error


def _section(text: str, key: str) -> tuple[int, str] | None:
    """Number and text of the line that begins a section of this name, as [KEY]."""
    begins = re.compile(rf"\s*(\[\[?\s*[\"']?{re.escape(key)}[\"']?\s*[].].*)")
    for number, line in enumerate(text.splitlines(), 1):
        if found := begins.match(line):
            return number, _shown(found[1].partition("#")[0].strip())[1:-1]
    return None


def _place(text: str, where: str, key: str) -> str:
    """Where a key stands in the file, "FILE, line N, key KEY": the line that sets it."""
    begins = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[.=]")
    numbers = [n for n, line in enumerate(text.splitlines(), 1) if begins.match(line)]
    return f"{where}, line {numbers[0]}, key {key}" if numbers else f"{where}, key {key}"


def _shown(value: object) -> str:
    """A value as an error shows it: short, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    shown = f'"{value}"' if isinstance(value, str) else repr(value)
    shown = " ".join(shown.split())
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
