"""What every model family must do when it is exported."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from edge_sdk.infer.early_exit import EarlyExit, open_session
from edge_sdk.infer.export import cut, export
from edge_sdk.infer.model_folder import read_model
from edge_sdk.infer.onnx_layers import NORMS, plain_model
from edge_sdk.models import build, initial_tensors
from tests.contract.families import ALL, IDS
from tests.support.examples import examples


@pytest.fixture(params=ALL, ids=IDS)
def spec(request):
    return request.param


def model_of(spec):
    """With BatchNorm statistics as after training: none of them 0 or 1."""
    model = build(spec).eval()
    rng = torch.Generator().manual_seed(1)
    held = initial_tensors(spec, 0)
    for name, tensor in held.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.1, 4.0, generator=rng)
        elif tensor.ndim == 1:
            tensor.normal_(generator=rng)
    model.load(held)
    return model


@torch.no_grad()
def test_folding_equals_eval_mode(spec):
    """Before any ONNX: no BatchNorm is left, and the function is the same."""
    model = model_of(spec)
    x = torch.from_numpy(examples(5, shape=spec.input_shape).x)
    plain = plain_model(model, x)
    assert not any(isinstance(layer, NORMS) for layer in plain.modules())
    has_norms = spec.family not in ("llama", "lstm", "transformer", "vit")
    assert any(isinstance(layer, NORMS) for layer in model.modules()) == has_norms
    for a, b in zip(plain(x), model(x), strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()))


@torch.no_grad()
def test_whole_and_stages_equal_torch_at_any_batch_size(spec, tmp_path):
    model = model_of(spec)
    data = examples(12, shape=spec.input_shape)
    made = export(spec, model.tensors(), tmp_path / "model", examples=data)
    assert made == read_model(tmp_path / "model")
    assert made.largest_difference < 1e-5
    for file in (tmp_path / "model").glob("*.onnx"):
        graph = onnx.load(file).graph
        assert "BatchNormalization" not in {node.op_type for node in graph.node}
    whole = open_session((tmp_path / "model" / "whole.onnx").read_bytes(), "whole")
    assert [value.name for value in whole.get_outputs()] == ["exit_1", "exit_2", "exit_3"]
    engine = EarlyExit.load(tmp_path / "model")
    cut(tmp_path / "model", 2, tmp_path / "cut")
    shorter = EarlyExit.load(tmp_path / "cut")
    for n in (1, 5, 11):
        x = data.x[:n]
        wanted = np.stack([logits.numpy() for logits in model(torch.from_numpy(x))])
        scale = np.abs(wanted).max()
        assert np.abs(np.stack(whole.run(None, {"input": x})) - wanted).max() < 1e-5 * scale
        assert np.abs(engine.all_exits(x) - wanted).max() < 1e-5 * scale
        assert np.abs(shorter.all_exits(x) - wanted[:2]).max() < 1e-5 * scale
