"""Transformers: what their blocks must not see, padding, widths with ranks, weights of others, and
wrong sizes. What they compute, numpy says in tests/conformance."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace
from torch.nn import functional

from edge_sdk.errors import ConfigError
from edge_sdk.models import build, initial_tensors, original_names
from edge_sdk.models.attention import Rotary, rotary_angles
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.training.trainer import train
from tests.contract.families import check_slice
from tests.support.examples import examples
from tests.support.packages import package_or_skip

LLAMA = ModelSpec(
    family="llama",
    input_shape=(7,),
    num_classes=11,
    exit=2,
    task="tokens",
    vocabulary=11,
    options={"layers": (2, 1), "dim": 16, "heads": 4, "kv_heads": 2, "ffn": 20},
)
TEXT = ModelSpec(
    family="transformer",
    input_shape=(6,),
    num_classes=3,
    exit=2,
    vocabulary=9,
    options={"dim": 8, "heads": 2, "pad": 0},
)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


SMALL = {"dim": 16, "heads": 2}


@pytest.mark.parametrize(
    ("family", "shape"), [("vit", (1, 8, 8)), ("transformer", (2, 10)), ("llama", (2, 10))]
)
def test_training_lowers_the_loss_of_every_exit(family, shape):
    spec = ModelSpec(family=family, input_shape=shape, num_classes=3, exit=2, options=SMALL)
    data = examples(24, shape=shape)
    plan = Plan(segments=(Segment(first=1, last=2),), batch_size=8, epochs=8, lr=0.01)
    model = build(spec).eval()
    held = initial_tensors(spec, 0)
    losses = []
    for tensors in (held, train(spec, plan, held, data).tensors):
        model.load(tensors)
        x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
        losses.append([functional.cross_entropy(z, y).item() for z in model(x)])
    assert all(after < before / 2 for before, after in zip(*losses, strict=True)), losses


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "shape"), [("vit", (1, 8, 8)), ("transformer", (2, 10)), ("llama", (2, 10))]
)
def test_features_lie_as_linear_layers_take_them(family, shape):
    """Otherwise each keeps a copy of its input for its backward pass."""
    spec = ModelSpec(family=family, input_shape=shape, num_classes=3, exit=2, options=SMALL)
    model = build(spec).ready("cpu")
    features = moved(torch.rand(2, *shape), "cpu")
    for stage in model.stages:
        features = stage(features)
        assert features.is_contiguous()


@torch.no_grad()
def test_a_token_is_answered_without_those_after_it():
    model = build(LLAMA).eval()
    other = IDS.clone()
    other[:, 4:] = 10 - other[:, 4:]
    for before, after in zip(model(IDS), model(other), strict=True):
        assert before.shape == (2, 7, 11)
        assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
        assert not torch.allclose(before[:, 4], after[:, 4], atol=1e-3)


@torch.no_grad()
def test_an_encoder_sees_all_tokens_but_padding():
    """What stands in the embedding of the padding, or in the positions under it, has no part."""
    model = build(TEXT).eval()
    ids = torch.tensor([[3, 1, 4, 0, 0, 0], [6, 5, 3, 5, 8, 7]])
    before = model(ids)
    model.stages[0][0].embedding.weight[0].normal_()
    model.stages[0][0].positions[3:].normal_()
    after = model(ids)
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one[0], other[0], atol=1e-6), "padding was attended to"
        assert not torch.allclose(one[1], other[1], atol=1e-3)
    without = build(replace(TEXT, options=TEXT.options | {"pad": -1})).eval()
    without.load(model.tensors())
    assert not torch.allclose(without(ids)[0][0], after[0][0], atol=1e-3)


def test_nothing_but_padding_gives_finite_logits_and_gradients():
    model = build(replace(TEXT, task="tokens"))
    logits = model(torch.zeros(2, 6, dtype=torch.int64))
    torch.stack(logits).square().sum().backward()
    assert all(torch.isfinite(z).all() for z in logits)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("rank", [1.0, 0.25])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_width_takes_heads_with_the_keys_that_they_share(rank, shift):
    """Of 8 heads that share 4 keys, 4 that share 2; of one head's features all."""
    options = LLAMA.options | {"dim": 32, "heads": 8, "kv_heads": 4, "ffn": 40}
    spec = replace(LLAMA, rank=rank, options=options)
    narrow = build(replace(spec, width=0.5)).tensors()
    layer = "stages.1.0.attention"
    part = ".u" if rank < 1 else ""
    assert narrow[f"{layer}.q{part}.weight"].shape[0] == 4 * 4
    assert narrow[f"{layer}.k{part}.weight"].shape[0] == 2 * 4
    check_slice(spec, 0.5, shift, is_same=False)
    if rank == 1:
        check_slice(replace(spec, vocabulary=0, task="classify", input_shape=(3, 9)), 0.5, shift)


def test_slow_angles_turn_slower():
    """Of 2 pairs: 1 turns 8192 / (2 pi) = 1304 times in 8192 positions and stays, 8192^-0.75 =
    0.00116 turns 1.5 times, is kept by (1.512 - 1) / 3 = 0.1707 and else divided by 8."""
    angles = rotary_angles(2, 4, Rotary(8192.0**1.5, 8.0))
    rate = 8192.0**-0.75
    kept = (rate * 8192 / 6.283185307 - 1) / 3
    assert 0.17 < kept < 0.172
    wanted = torch.tensor([1.0, rate * (kept + (1 - kept) / 8)])
    assert torch.allclose(angles[1], wanted.repeat(2))
    assert torch.equal(angles[0], torch.zeros(4))


def test_every_tensor_of_llama_has_the_name_of_the_well_known_implementation():
    names = original_names(LLAMA)
    assert set(names) == set(build(LLAMA).tensors())
    assert names["stages.0.0.embedding.weight"] == "model.embed_tokens.weight"
    assert names["stages.0.2.attention.k.weight"] == "model.layers.1.self_attn.k_proj.weight"
    assert names["stages.1.0.norm_2.weight"] == "model.layers.2.post_attention_layernorm.weight"
    assert {names[f"exits.{e}.head.weight"] for e in (0, 1)} == {"lm_head.weight"}
    tied = original_names(replace(LLAMA, options=LLAMA.options | {"tied": True}))
    assert tied["exits.0.head.weight"] == "model.embed_tokens.weight"
    assert original_names(replace(LLAMA, task="classify"))["exits.1.head.weight"] == "score.weight"


@torch.no_grad()
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_llama_equals_the_well_known_implementation(factor):
    transformers = package_or_skip("transformers")
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=32,
        rope_theta=5000.0,
        rope_scaling=scaling if factor > 1 else None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    held = {name: torch.randn_like(t) / 4 for name, t in theirs.state_dict().items()}
    theirs.load_state_dict(held)
    options = LLAMA.options | {"rotary": 5000.0, "rotary_factor": factor}
    spec = replace(LLAMA, options=options)
    model = build(spec).eval()
    names = original_names(spec)
    assert set(names.values()) == set(held)
    model.load({own: held[original] for own, original in names.items()})
    wanted = theirs(IDS).logits
    assert torch.allclose(model(IDS)[-1], wanted, atol=1e-5 * float(wanted.abs().max()))


WRONG = [
    (LLAMA, {"heads": 3}, "heads is 3, expected a divisor of dim 16"),
    (LLAMA, {"kv_heads": 3}, "kv_heads is 3, expected a divisor of heads 4"),
    (LLAMA, {"dim": 12}, "heads gives heads of 3 of dim 12 features, expected an even number"),
    (LLAMA, {"layers": (1,)}, "layers is (1,), expected at least 2"),
    (TEXT, {"pad": 9}, "pad is 9, expected an id below the vocabulary of 9"),
]


@pytest.mark.parametrize(("spec", "options", "said"), WRONG, ids=lambda value: str(value)[:30])
def test_sizes_that_do_not_fit_each_other_are_refused(spec, options, said):
    with pytest.raises(ConfigError) as caught:
        build(replace(spec, options=spec.options | options))
    assert said in str(caught.value)


def test_ids_where_floats_are_taken_and_floats_where_ids_are():
    series = replace(TEXT, vocabulary=0, input_shape=(3, 8))
    for spec, said in [
        (replace(TEXT, family="vit", options={}), "'vit' takes floats, got token ids"),
        (replace(TEXT, family="mlp", options={}), "'mlp' takes floats, got token ids"),
        (replace(TEXT, input_shape=(3, 8)), "takes token ids \\(T,\\), got \\(3, 8\\)"),
        (series, "pad is 0, but inputs are floats"),
        (replace(series, options={}, task="tokens"), "task tokens without a vocabulary"),
        (replace(series, options={}, input_shape=(8,)), "takes input \\(C, window\\), got \\(8,"),
    ]:
        with pytest.raises(ConfigError, match=said):
            build(spec)
