"""A run's folder as a command opens it: a new run, or one that goes on."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from msgspec.structs import replace

from coordinator.config import RunConfig
from coordinator.settings import differences
from coordinator.store.checkpoints import read_sound
from coordinator.store.store import Store
from edge_sdk.data.contract import mismatch
from edge_sdk.errors import ConfigError, StoreError

log = logging.getLogger(__name__)


def open_store(folder: Path, config: RunConfig, kind: str, resume: bool) -> Store:
    """Begin a run, or with `resume` go on with the one there, which must have the same settings;
    of rounds there may be more. Raises ConfigError, StoreError."""
    store = Store.resume(folder) if resume else Store.create(folder, config, kind)
    with ExitStack() as stack:  # closes it after an error
        stack.callback(store.close)
        store.lock()
        held = store.config
        if held.trained_on.scaling is None:  # stored by a version that did not tell it
            held = replace(held, trained_on=config.trained_on)
        now = config.trained_on.scaling
        free = replace(
            held,
            rounds=max(held.rounds, config.rounds),
            aggregation=replace(held.aggregation, refuse_above=config.aggregation.refuse_above),
            trained_on=replace(held.trained_on, scaling=now),
        )
        if free.to_json() != config.to_json():
            raise ConfigError(
                f"{folder} was started with other settings: {differences(free, config)}; resume "
                "with the same flags; --rounds may be higher, --refuse-above another"
            )
        if found := mismatch(
            held.trained_on.scaling, now, (f"the run in {folder}", "its data now")
        ):
            if found.is_certain:
                raise ConfigError(found.text)
            log.warning("%s", found.text)
        if config.rounds > held.rounds:
            log.info("the run gets %d rounds instead of %d", config.rounds, held.rounds)
        if resume:
            store.amend(config)
            _take_sound(store)
            store.sweep()
        stack.pop_all()
    return store


def _take_sound(store: Store) -> None:
    """Go on from the newest checkpoint that a run can go on from. Raises StoreError: there is
    none."""
    wrong: list[str] = []
    for round, path in store.checkpoints():
        try:
            read_sound(path)
        except StoreError as error:
            wrong.append(str(error))
            continue
        if wrong:
            log.error("%s; round %d and later are forgotten", "; ".join(wrong), round + 1)
            store.go_back(round)
        log.info("going on after round %d, from %s", round, path.name)
        return
    if wrong:
        raise StoreError(f"{'; '.join(wrong)}; start another --run-dir, or put back a copy of it")
