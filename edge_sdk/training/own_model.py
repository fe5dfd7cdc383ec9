"""The model of its own that a device trains for a run that is sent one vector of its weights
(terms/flat.py). The coordinator never has it whole: the statistics of BatchNorm stay here, and of
a device's own architecture it knows the number of weights alone. So the device keeps the weights of
its last accepted update beside the statistics, from which the model can be exported."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_sdk.data.contract import ModelNote
from edge_sdk.errors import EdgeError, StoreError
from edge_sdk.helpers.files import why_not
from edge_sdk.helpers.text import one_line
from edge_sdk.models import build
from edge_sdk.models.flat import parameter_shapes, unflatten
from edge_sdk.protocol.messages import Job
from edge_sdk.protocol.plan_tensors import FLAT
from edge_sdk.protocol.tensors import Tensors, with_prefix
from edge_sdk.training.client_state import OnDisk
from edge_sdk.training.saved_update import STATE
from edge_sdk.training.terms.flat import KEPT as STATISTICS


def weights_to_keep(job: Job, returned: Tensors) -> Tensors:
    """Of an update's tensors those that belong to the device's own model, to be kept with its
    statistics; {} where the run has the model whole."""
    return {FLAT: returned[FLAT]} if job.plan.flat else {}


def read_own_model(folder: Path) -> tuple[ModelNote, Tensors]:
    """The model of the newest accepted update, with what it is of. folder: of the device's saved
    updates. Raises StoreError."""
    expected = "expected the folder of a device's own, such as ~/.cache/edge-sdk/updates/ID-..."
    shelf = OnDisk(folder / STATE, is_synced=False)
    try:
        accepted = [place for place in shelf.places() if place.job is None]
        if not accepted:
            raise StoreError(f"{folder} holds no update that was accepted, {expected}")
        note, kept = shelf.read(max(accepted, key=lambda place: place.round))
        if note is None or FLAT not in kept:
            said = "keeps no model of its own; its coordinator has it: edge-coordinator export"
            raise StoreError(f"{folder}: the device {said} --client")
        model = build(note.spec)
        weights = unflatten(kept[FLAT], parameter_shapes(model))
        found = weights | with_prefix(kept, STATISTICS)
        return note, {name: found[name] for name in model.tensors()}
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {why_not(error)}; {expected}") from error
    except StoreError:
        raise
    except (KeyError, ValueError, msgspec.MsgspecError, EdgeError) as error:
        raise StoreError(
            f"{folder}: the kept model cannot be used: {one_line(str(error))}; train once more"
        ) from error
