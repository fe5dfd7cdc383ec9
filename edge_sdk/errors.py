"""Every error that a caller may want to catch, in one tree.

    EdgeError
    ├── ConfigError      a value from a person: flag, file, preset, unknown name
    │   ├── UsageError       what was typed is wrong in itself; the commands end with status 2
    │   └── LackError        this machine or user lacks something: a package, a home
    ├── DataError        a data set: missing, corrupt, wrong shape, empty shard
    ├── ShapeError       tensors that do not belong to the model: name, shape, dtype, NaN
    │   └── UpdateError      an update that no honest training gives
    ├── CapacityError    the device cannot do what is asked: too small, out of memory
    ├── TrainerError     the trainer ended or failed
    ├── LinkError        no connection, lost connection, refused identity
    ├── ProtocolError    a message that breaks docs/protocol.md
    │   └── VersionError     the other side speaks another version of it
    ├── QuorumError      too few devices for a round, for too long
    ├── ExportError      a finished run whose model could not be exported
    └── StoreError       a run's or model's folder: another version, full disk, corrupt file

Each message is one line: what, where, got, expected, next step. `code` is what travels in a
`Fault`, so both ends name a fault alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EdgeError(Exception):
    """Base of all errors raised on purpose by edge_sdk and coordinator."""

    code = "error"


class ConfigError(EdgeError):
    code = "config"


class UsageError(ConfigError):
    """Known before any work is done, by what was typed alone."""


class LackError(ConfigError):
    """The same would do on a machine, or for a user, that has what lacks here."""


class DataError(EdgeError):
    code = "data"


class ShapeError(EdgeError):
    code = "tensors"


class UpdateError(ShapeError):
    code = "update"


class CapacityError(EdgeError):
    code = "capacity"


class TrainerError(EdgeError):
    code = "trainer"


class LinkError(EdgeError):
    code = "link"


class ProtocolError(EdgeError):
    code = "protocol"


class VersionError(ProtocolError):
    code = "version"


class QuorumError(EdgeError):
    code = "quorum"


class ExportError(EdgeError):
    code = "export"


class StoreError(EdgeError):
    code = "store"


@contextmanager
def typed() -> Iterator[None]:
    """A ConfigError in here is about what was typed: it becomes a UsageError."""
    try:
        yield
    except (UsageError, LackError):
        raise
    except ConfigError as error:
        raise UsageError(str(error)) from error


def status_of(error: EdgeError) -> int:
    """With which a command ends."""
    return 2 if isinstance(error, UsageError) else 1
