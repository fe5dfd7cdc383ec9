"""`edge-coordinator export`, and the export at the end of a run: the served model as ONNX."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from coordinator.cohorts.base import Client
from coordinator.cohorts.in_process import RUN
from coordinator.config import RunConfig
from coordinator.methods.base import Method, families_of
from coordinator.methods.registry import make_method
from coordinator.runs.beginning import load_state
from coordinator.runs.families import check_backbone
from coordinator.runs.own_models import STATES, check_global
from coordinator.runs.untrained import deepest_trained, tell_untrained, untrained_exits
from coordinator.store.store import Store
from edge_sdk.data.loading import Examples, load_dataset, load_test
from edge_sdk.errors import ConfigError, DataError, EdgeError, ExportError, StoreError
from edge_sdk.helpers.text import one_line
from edge_sdk.infer.export import check_exportable, check_packages, export, prefix
from edge_sdk.infer.model_folder import check_target, described
from edge_sdk.models import build
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.plan_tensors import FLAT
from edge_sdk.protocol.tensors import Tensors, with_prefix
from edge_sdk.training.client_state import ClientState
from edge_sdk.training.terms.flat import KEPT as STATISTICS

log = logging.getLogger(__name__)


def check_export(folder: Path | None) -> None:
    """Raise ConfigError or StoreError now rather than after a long run."""
    if folder:
        check_packages()
        check_target(folder)


def try_export(method: Method, examples: Examples | None, folder: Path | None) -> None:
    """Raise ConfigError now, if a folder is named, for a model that could not be exported after a
    long run: exported as it is before training, and thrown away."""
    if not folder:
        return
    part = "--backbone NAME" if families_of(method) else "--client NAME"
    check_global(method, f"--export {folder}", f"leave it out; edge-coordinator export {part}")
    try:
        check_exportable(method.spec, method.current(), examples)
    except EdgeError as error:
        said = f"--export {folder}: {error}; or leave --export out; nothing was trained"
        raise ConfigError(said) from error


def export_finished(
    store: Store,
    method: Method,
    examples: Examples | None,
    folder: Path | None,
    untrained: Collection[int] = (),
    imports: Sequence[str] = (),
) -> None:
    """Write the served model of a finished run, if a folder is named, up to the deepest exit that a
    device trained. Raises ExportError, which says how to do it again: the run is finished all the
    same."""
    if not folder:
        return
    try:
        deepest = deepest_trained(untrained, method.spec.exit)
        spec, tensors = prefix(method.spec, method.served(), deepest)
        trained_on = store.config.trained_on
        made = export(spec, tensors, folder, examples=examples, trained_on=trained_on)
    except Exception as error:  # of a user's layers, of torch's and onnx's code
        log.debug("export failed", exc_info=True)
        why = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
        flags = ["--run", str(store.folder), "--out", str(folder)]
        flags += [flag for module in imports for flag in ("--import", module)]
        way = shlex.join(["edge-coordinator", "export", *flags])
        raise ExportError(
            f"run {store.run} is finished, but its model was not exported: {one_line(why, 500)}; "
            + (store.way_on() if store.is_temporary else f"mend that, then {way}")
        ) from error
    print(described(made, folder))


def export_run(
    folder: Path,
    out: Path,
    *,
    client_id: str | None = None,
    exit: int | None = None,
    backbone: str | None = None,
    data: str | None = None,
) -> None:
    """Write a run's served model, or a client's part of it, or its first exits, as ONNX. backbone:
    of a run with several. data: to check it on, by default the run's own test set. Raises
    EdgeError."""
    check_export(out)
    store = Store.open_readonly(folder)
    try:
        if store.next_round() == 1:
            raise StoreError(f"{folder} has no finished round yet; nothing to export")
        method = make_method(store.config)
        load_state(store, method)
        if backbone is not None:
            families = families_of(method)
            check_backbone(families, backbone)
            chosen = families[backbone]
            spec, tensors = prefix(chosen.spec, chosen.served, exit or chosen.spec.exit)
        else:
            spec, tensors = chosen_part(store, method, client_id, exit)
        examples = load_test(data) if data else run_examples(store.config)
    finally:
        store.close()
    made = export(spec, tensors, out, examples=examples, trained_on=store.config.trained_on)
    print(described(made, out))


def chosen_part(
    store: Store, method: Method, client_id: str | None, exit: int | None
) -> tuple[ModelSpec, Tensors]:
    """The served model: a client's part, its first exits, or all that devices trained. Raises
    ConfigError."""
    if client_id is None:
        instead = f"give --client: {_some(store.client_models())}"
        if families := families_of(method):
            instead = f"give --backbone: {', '.join(families)}, or --client"
        check_global(method, f"{store.folder}", instead)
        untrained = untrained_exits(store, method.spec.exit)
        tell_untrained(untrained, method.spec.exit)
        return prefix(
            method.spec, method.served(), exit or deepest_trained(untrained, method.spec.exit)
        )
    known = store.client_models()
    if client_id not in known:
        raise ConfigError(
            f"client {client_id!r} took part in no round of {store.folder}; {len(known)} did: "
            f"{_some(known)}"
        )
    return own_model(store, method, known[client_id])


def own_model(store: Store, method: Method, client: Client) -> tuple[ModelSpec, Tensors]:
    """What the client can run, with the statistics of BatchNorm that an emulated one keeps. Raises
    ConfigError where a part of it is with the client alone."""
    spec, tensors = method.deployed(client)
    if FLAT in tensors:
        raise ConfigError(
            f"client {client.id!r} has a model of its own, of {client.num_weights} weights, which "
            f"only it can build; {on_device(client.id)}"
        )
    if not method.offer().plan.flat:
        return spec, tensors
    buffers = [name for name, _ in build(spec).named_buffers()]
    folder = store.folder / STATES / client.id
    kept = ClientState(folder).load(RUN, store.next_round())[1] if folder.exists() else {}
    statistics = with_prefix(kept, STATISTICS)
    if lacking := sorted(set(buffers) - set(statistics)):
        raise ConfigError(
            f"client {client.id!r} keeps the statistics of BatchNorm itself ({lacking[0]}, ...), "
            f"and {folder} has none of them; {on_device(client.id)}"
        )
    return spec, tensors | statistics


def on_device(name: str) -> str:
    """How a device's own model is exported, where the whole of it is."""
    return f"on that device: edge-sdk export ~/.cache/edge-sdk/updates/{name}-... --out model"


def _some(known: Collection[str]) -> str:
    """The first of the clients' names."""
    return (", ".join(sorted(known)[:5]) or "none") + ", ..." * (len(known) > 5)


def run_examples(config: RunConfig) -> Examples | None:
    """The run's test set; None, with a warning, where it cannot be read any more."""
    try:
        if config.population:  # emulated: part of one source
            return load_dataset(
                config.data, config.seed, config.examples, config.test_examples
            ).test
        return load_test(config.data) if config.data else None
    except (ConfigError, DataError) as error:
        log.warning("checking on random inputs, scaling is not known: %s", error)
        return None
