"""A model of the device's own, exported from what the device keeps of its last accepted update."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.agent.pipe import Keep, Pipe, Train
from edge_sdk.cli.main import main
from edge_sdk.errors import StoreError
from edge_sdk.infer import EarlyExit
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.flat import flatten, parameter_shapes
from edge_sdk.protocol.messages import Fault, Job, Part, Plan, Segment, Update
from edge_sdk.protocol.tensors import Sender
from edge_sdk.training.calibration import MemoryCalibration
from edge_sdk.training.client_state import ClientState
from edge_sdk.training.kept_tensors import KeptTensors
from edge_sdk.training.own_model import read_own_model
from edge_sdk.training.saved_update import STATE, SavedUpdate
from edge_sdk.training.trainer import train
from edge_sdk.training.worker import TrainerLoop
from tests.support.examples import cnn, examples, one_line

SPEC = cnn(exit=2)
PLAN = Plan(segments=(Segment(first=1, last=2),), batch_size=8, lr=0.01, flat=True, seed=3)
SHAPES = parameter_shapes(build(SPEC))
SENT = Sender({"flat/all": flatten(initial_tensors(SPEC, 5), SHAPES)})
DATA = examples(24)


def rounds_of(folder, *accepted, plan=PLAN, sent=SENT, spec=SPEC, data=DATA):
    """A device's trainer does a job of each round; of each, whether its update is accepted."""
    ours, theirs = socket.socketpair()
    agent, saved = Pipe(ours), SavedUpdate(folder)
    here, state = MemoryCalibration(made_with=""), ClientState(folder / STATE)
    loop = TrainerLoop(Pipe(theirs), data, "cpu", here, saved, state, KeptTensors(folder / "kept"))
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(loop.serve, 0.0, 0.0)
        for round, is_accepted in enumerate(accepted, 1):
            id = f"{round:032x}"
            job = Job(id=id, round=round, model=spec, plan=plan, tensors=sent.specs, deadline_s=0.0)
            agent.send(Train(job=job, run="run", cache_bytes=0))
            for index in range(sent.num_parts):
                agent.send(Part(round=round, index=index), sent.part(index))
            while not isinstance(message := agent.receive()[0], Update):
                assert not isinstance(message, Fault), message
            if is_accepted:
                agent.send(Keep(run="run", round=round, job=id))
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            ended.result(60)
    theirs.close()
    ours.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pi-1-0123456789ab"


def test_it_is_the_model_as_it_was_trained_last(folder):
    """With the statistics that belong to it, and the second round begins from the first one's."""
    rounds_of(folder, True)
    note, first = read_own_model(folder)
    assert (note.spec, note.data) == (SPEC, DATA.trained_on)
    plain = train(SPEC, replace(PLAN, flat=False), initial_tensors(SPEC, 5), DATA).tensors
    assert list(first) == list(build(SPEC).tensors())
    assert all(torch.equal(first[name], plain[name]) for name in plain)
    rounds_of(folder, True, True)
    _, second = read_own_model(folder)
    buffers = {name: first[name] for name in first if name not in SHAPES}
    again = train(SPEC, replace(PLAN, flat=False), initial_tensors(SPEC, 5) | buffers, DATA).tensors
    assert all(torch.equal(second[name], again[name]) for name in again)


def test_what_was_not_accepted_does_not_count(folder):
    rounds_of(folder, False)
    with pytest.raises(StoreError, match="holds no update that was accepted"):
        read_own_model(folder)
    rounds_of(folder, True, False)
    first = read_own_model(folder)[1]
    rounds_of(folder, True)
    assert all(torch.equal(first[n], t) for n, t in read_own_model(folder)[1].items())


def test_of_a_model_without_statistics_too(folder):
    spec = replace(SPEC, family="lstm", input_shape=(8, 8), options={"hidden": 4})
    weights = initial_tensors(spec, 0)
    sent = Sender({"flat/all": flatten(weights, parameter_shapes(build(spec)))})
    rounds_of(folder, True, spec=spec, sent=sent, data=examples(24, shape=(8, 8)))
    assert read_own_model(folder)[1].keys() == weights.keys()


def test_a_model_of_the_run_is_not_the_devices_own(folder):
    """Of SCAFFOLD a device keeps its control variates."""
    plan = replace(PLAN, flat=False, optimizer="sgd", correction=True)
    weights = initial_tensors(SPEC, 5)
    variates = {f"correction/{name}": torch.zeros(shape) for name, shape in SHAPES.items()}
    rounds_of(folder, True, plan=plan, sent=Sender(weights | variates))
    with pytest.raises(StoreError, match="keeps no model of its own; its coordinator has it"):
        read_own_model(folder)


def test_a_damaged_one_is_told(folder):
    rounds_of(folder, True)
    (path,) = (folder / STATE).iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(StoreError, match="the kept model cannot be used.*damaged; train once more"):
        read_own_model(folder)


def test_the_command_writes_it(folder, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    rounds_of(folder, True)
    out = tmp_path / "model"
    assert main(["export", str(folder), "--out", str(out)]) == 0
    assert "exits 1 to 2" in capsys.readouterr().out
    model = build(SPEC)
    model.load(read_own_model(folder)[1])
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(DATA.x))[1].argmax(1)
    found = EarlyExit.load(out, threshold=1.0).predict(DATA.x)
    assert found.label.tolist() == wanted.tolist()
    assert main(["export", str(tmp_path), "--out", str(out)]) == 2
    (tmp_path / STATE).mkdir()
    capsys.readouterr()
    assert main(["export", str(tmp_path), "--out", str(out)]) == 1
    assert "holds no update" in one_line(capsys.readouterr().err, "edge-sdk")
