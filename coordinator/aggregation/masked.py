"""What an update of masked weights (edge_sdk/models/masks.py) must be like to count: each mask
within the one of its job, and as many values as it keeps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from edge_sdk.errors import UpdateError


def kept_of_sent(
    name: str, tensors: Mapping[str, Tensor], sent: Mapping[str, Tensor], where: str
) -> Tensor:
    """Of weight `name`: the values that its job brought of the entries that the update keeps, 1-D,
    as many as the update's own. tensors, sent: of the update and of its job, as they travelled.
    Raises UpdateError for a mask or values that no training gives."""
    values = tensors[f"packed/{name}"]
    bits, old = tensors.get(f"mask/{name}"), sent.get(f"mask/{name}")
    if bits is None or old is None or (bits.shape, bits.dtype) != (old.shape, old.dtype):
        raise UpdateError(f"{where}: packed/{name} came without the mask that its job had")
    entries, held = (np.unpackbits(mask.numpy(), bitorder="little") for mask in (bits, old))
    if grown := int((entries > held).sum()):
        raise UpdateError(
            f"{where}: the mask of {name} keeps {grown} entries that its job's did not; a mask "
            "only loses entries"
        )
    if values.shape != (kept := int(entries.sum()),):
        raise UpdateError(f"{where}: {name} has {tuple(values.shape)} values under {kept} bits")
    return sent[f"packed/{name}"][entries[held == 1] == 1]
