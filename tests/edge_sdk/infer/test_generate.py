"""Generation by an exported llama against torch, token by token."""

from __future__ import annotations

from dataclasses import replace as changed

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from edge_sdk.errors import ConfigError, DataError
from edge_sdk.infer.early_exit import NEVER, EarlyExit
from edge_sdk.infer.export import export
from edge_sdk.infer.generate import generate
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.adapters.attach import KINDS
from edge_sdk.protocol.messages import Adapters, ModelSpec

SPEC = ModelSpec(
    family="llama",
    input_shape=(6,),
    num_classes=7,
    exit=2,
    task="tokens",
    vocabulary=7,
    options={"dim": 8, "heads": 2},
)
PROMPT = [3, 1, 4]


def exported(spec, folder, **flags):
    """Of weights that are as far from each other as trained ones; adapters begin as nothing."""
    draws = torch.Generator().manual_seed(0)
    tensors = {
        n: 8 * t
        if "head" in n or "emb" in n
        else t + torch.randn(t.shape, generator=draws) * ("adapter" in n)
        for n, t in initial_tensors(spec, 0).items()
    }
    export(spec, tensors, folder)
    model = build(spec).eval()
    model.load(tensors)
    return EarlyExit.load(folder, **flags), model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return exported(SPEC, tmp_path_factory.mktemp("generate") / "model")


@torch.no_grad()
def by_torch(model, count, threshold):
    """Tokens, exits, confidences; of the text alone, nothing after it, at most 6 tokens."""
    text, exits, confidences = list(PROMPT), [], []
    for _ in range(count):
        answers = [z[0, -1].softmax(0) for z in model(torch.tensor([text[-6:]]))]
        exit = next((e for e, p in enumerate(answers) if p.max() >= threshold), len(answers) - 1)
        text.append(int(answers[exit].argmax()))
        exits.append(exit + 1)
        confidences.append(float(answers[exit].max()))
    return text[len(PROMPT) :], exits, confidences


@pytest.mark.parametrize("threshold", [0.0, 0.9, NEVER])
def test_tokens_exits_and_confidences_are_those_of_torch(llama, threshold):
    """8 tokens: the window of 6 moves on."""
    engine, model = llama
    found = generate(changed(engine, thresholds=(threshold,)), PROMPT, 8)
    ids, exits, confidences = by_torch(model, 8, threshold)
    assert found.ids.tolist() == ids
    assert found.exits.tolist() == exits
    np.testing.assert_allclose(found.confidences, confidences, rtol=1e-4)
    assert set(exits) == {0.0: {1}, 0.9: {1, 2}, NEVER: {2}}[threshold]


@pytest.mark.parametrize("kind", KINDS)
def test_with_adapters_they_are_those_of_torch_too(kind, tmp_path):
    """lora and pq-lora are merged into the exported weights, dema is not."""
    engine, model = exported(
        replace(SPEC, adapters=Adapters(kind=kind, rank=2)), tmp_path / "model"
    )
    found = generate(changed(engine, thresholds=(0.6,)), PROMPT, 8)
    ids, exits, confidences = by_torch(model, 8, 0.6)
    assert (found.ids.tolist(), found.exits.tolist()) == (ids, exits)
    np.testing.assert_allclose(found.confidences, confidences, rtol=1e-4)


def test_an_id_may_end_the_text(llama):
    engine, _ = llama
    whole = generate(engine, PROMPT, 8).ids.tolist()
    end = whole[2]
    cut = generate(engine, PROMPT, 8, end=end).ids.tolist()
    assert cut == whole[: whole.index(end) + 1]


def test_what_gives_no_next_token_is_refused(llama, tmp_path):
    engine, _ = llama
    for prompt, count in [([], 3), (PROMPT, 0)]:
        with pytest.raises(ConfigError, match="expected at least one of each"):
            generate(engine, prompt, count)
    with pytest.raises(DataError, match="token ids from 3 to 7, expected 0 to 6"):
        generate(engine, [3, 7], 1)
    others = replace(engine.model, spec=replace(SPEC, task="classify"))
    with pytest.raises(ConfigError, match="a model of task classify, .* tells no next token"):
        generate(changed(engine, model=others), PROMPT, 1)
    encoder, _ = exported(replace(SPEC, family="transformer"), tmp_path / "model")
    with pytest.raises(ConfigError, match="'transformer' answers a token by those after it"):
        generate(encoder, PROMPT, 1)
