"""Adapters by numbers that are told by hand, how many weights they have, and what is refused."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from edge_sdk.errors import ConfigError
from edge_sdk.models import build
from edge_sdk.models.adapters import dema, lora, pq_lora
from edge_sdk.models.adapters.attach import shared_names
from edge_sdk.models.checking import check_family
from edge_sdk.protocol.messages import Adapters, ModelSpec
from edge_sdk.protocol.tensor_lists import ADAPTER, frozen_prefixes, is_frozen
from tests.support.examples import cnn

LLAMA = ModelSpec(
    family="llama",
    input_shape=(6,),
    num_classes=3,
    exit=2,
    vocabulary=9,
    options={"dim": 8, "heads": 2, "ffn": 12},
)


def filled_(adapter, **values):
    with torch.no_grad():
        for name, value in values.items():
            adapter.get_parameter(name.replace("_", ".")).copy_(torch.tensor(value))


def test_lora_by_hand():
    """W x = (1, 2); A x = 1 + 2 * 2 = 5; B (A x) = (15, -5)."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(torch.eye(2))
    lora.attach(layer, "it", Adapters(kind="lora", rank=1))
    filled_(layer.adapter, down_weight=[[1.0, 2.0]], up_weight=[[3.0], [-1.0]])
    x = torch.tensor([[1.0, 2.0]])
    assert layer(x).tolist() == [[16.0, -3.0]]
    assert lora.merge(layer)
    # W + B A
    assert layer.weight.tolist() == [[4.0, 6.0], [-1.0, -1.0]]


def test_lora_of_a_convolution_is_one_merged_kernel():
    layer = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1)
    lora.attach(layer, "it", Adapters(kind="lora", rank=2))
    assert [tuple(p.shape) for p in layer.adapter.parameters()] == [(2, 3, 3, 2), (4, 2, 1, 1)]
    nn.init.normal_(layer.adapter.up.weight)
    x = torch.randn(2, 3, 7, 8)
    wanted = layer(x)
    assert lora.merge(layer)
    layer._forward_hooks.clear()
    torch.testing.assert_close(layer(x), wanted)


def test_pq_lora_by_hand():
    """With bases of units: A x = x0 = 1, P A x + Q = 2 + 3 = 5, added to the second output."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(torch.eye(2))
    pq_lora.attach(layer, "it", Adapters(kind="pq-lora", rank=1))
    filled_(layer.get_submodule("basis"), a=[[1.0, 0.0]], b=[[0.0], [1.0]])
    filled_(layer.adapter, p=[[2.0]], q=[3.0])
    x = torch.tensor([[1.0, 2.0]])
    assert layer(x).tolist() == [[1.0, 7.0]]
    assert pq_lora.merge(layer)
    assert (layer.weight.tolist(), layer.bias.tolist()) == ([[1.0, 0.0], [2.0, 1.0]], [0.0, 3.0])


def test_the_bases_of_pq_lora_are_orthonormal():
    basis = pq_lora.Basis(7, 5, 3)
    torch.testing.assert_close(basis.a @ basis.a.T, torch.eye(3))
    torch.testing.assert_close(basis.b.T @ basis.b, torch.eye(3))


@pytest.mark.parametrize("is_channels_first", [False, True])
def test_dema_is_the_sum_over_its_branches(is_channels_first):
    adapter = dema.DeMA(
        5, Adapters(kind="dema", rank=2, branches=3), is_channels_first=is_channels_first
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
        x = torch.randn(2, 4, 5)  # features last
        shares = adapter.gate.exp() / adapter.gate.exp().sum()
        made = torch.zeros_like(x)
        for share, branch in zip(shares, adapter.branches, strict=True):
            made += share * nn.functional.gelu(x @ adapter.down @ branch) @ adapter.up
        got = adapter(x.movedim(-1, 1)).movedim(1, -1) if is_channels_first else adapter(x)
        torch.testing.assert_close(got, x + made)


@pytest.mark.parametrize("is_channels_first", [False, True])
def test_dema_keeps_padding_zero(is_channels_first):
    adapter = dema.DeMA(4, Adapters(kind="dema", rank=2), is_channels_first=is_channels_first)
    nn.init.normal_(adapter.up)
    assert not adapter(torch.zeros(2, 4, 4)).any()


def test_a_padded_token_stays_padding():
    """The transformer reads it from features of zeros."""
    options = {"dim": 8, "heads": 2, "pad": 0}
    spec = ModelSpec(
        family="transformer",
        input_shape=(5,),
        num_classes=3,
        exit=2,
        vocabulary=9,
        options=options,
        adapters=Adapters(kind="dema", rank=2),
    )
    model = build(spec).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("adapter.up"):
            nn.init.normal_(parameter)
    features = model.stages[1](model.stages[0](torch.tensor([[3, 4, 0, 0, 0]])))
    assert features[0, :2].all(-1).tolist() == [True, True]
    assert not features[0, 2:].any()


@pytest.mark.parametrize(
    ("adapters", "each"),
    [
        # q, k, v, o of 8 to 8; gate and up of 8 to 12, down of 12 to 8
        (Adapters(kind="lora", rank=2), 4 * 2 * 16 + 3 * 2 * 20),
        (Adapters(kind="lora", rank=2, targets=("attention.[qv]",)), 2 * 2 * 16),
        (Adapters(kind="pq-lora", rank=3), 7 * (3 * 3 + 3)),
        (Adapters(kind="dema", rank=4, branches=3), 2 * 8 * 4 + 3 * 4 * 4 + 3),
    ],
    ids=lambda given: f"{given.kind} {given.targets}" if isinstance(given, Adapters) else "",
)
def test_weights_of_each_block(adapters, each):
    model = build(replace(LLAMA, adapters=adapters))
    counts = [
        sum(p.numel() for n, p in stage.named_parameters() if ADAPTER in n.split("."))
        for stage in model.stages
    ]
    assert counts == [each, each]


def test_what_models_of_any_size_have_in_common():
    for kind, shared in [("lora", 0), ("dema", 2 * 2), ("pq-lora", 2 * 7 * 2)]:
        adapters = Adapters(kind=kind, rank=2)
        sizes = [
            {
                n: t.shape
                for n, t in build(replace(LLAMA, adapters=adapters, options=o)).tensors().items()
            }
            for o in (LLAMA.options, {"dim": 16, "heads": 4})
        ]
        found = [{n: held[n] for n in shared_names(adapters, list(held))} for held in sizes]
        assert found[0] == found[1]
        assert len(found[0]) == shared
    assert shared_names(None, ["stages.0.0.adapter.gate"]) == []


def test_a_module_named_adapter_is_trained_in_a_frozen_backbone():
    assert is_frozen("stages.0.1.weight", ("stages",))
    assert not is_frozen("stages.0.adapter.0.weight", ("stages",))
    assert is_frozen("stages.0.adapters.weight", ("stages",))
    assert is_frozen("stages.0.1.basis.a", ("stages",))


def test_with_adapters_the_backbone_is_frozen():
    assert frozen_prefixes("", 2, has_adapters=True) == ("stages",)
    assert frozen_prefixes("all", 2, has_adapters=True) == ("stages", "exits")
    with pytest.raises(
        ConfigError, match="--freeze stages=1 with --adapt, expected backbone or all"
    ):
        frozen_prefixes("stages=1", 2, has_adapters=True)
    with pytest.raises(ConfigError, match="--freeze all leaves nothing to train; give --adapt"):
        frozen_prefixes("all", 2)


@pytest.mark.parametrize(
    ("spec", "given", "said"),
    [
        (LLAMA, {"kind": "lore"}, "--adapt 'lore' is none of lora, dema, pq-lora"),
        (LLAMA, {"kind": "lora", "rank": 9}, "--adapt-rank 9 is above stages.0.1.attention.q, "),
        (LLAMA, {"kind": "pq-lora", "rank": 99}, "which is 8 to 8; give at most 8"),
        (LLAMA, {"kind": "lora", "branches": 2}, "--adapt-branches 2 is for --adapt dema"),
        (
            LLAMA,
            {"kind": "lora", "targets": ("attention.q", "attn.v")},
            "--adapt-targets attn.v match no module of the stages; there are stages.0.1.at",
        ),
        (LLAMA, {"kind": "lora", "targets": ("exits.*",)}, r"exits\.\* match no module of the st"),
        (LLAMA, {"kind": "lora", "targets": ("norm_1",)}, "norm_1 is RMSNorm, lora wants a linear"),
        (LLAMA, {"kind": "pq-lora", "targets": ("0.0",)}, "0.0 is Tokens, pq-lora wants a linear"),
        (LLAMA, {"kind": "lora", "first": 3}, "--adapt-from 3 of a model of 2 stages; give 1 to 2"),
        (
            LLAMA,
            {"kind": "lora", "targets": ("stages.0.1.attention.q",), "first": 2},
            "finds nothing to adapt in family 'llama' from stage 2 on; name modules as --adapt-t",
        ),
        (cnn(), {"kind": "dema", "targets": ("2",)}, "has no layer with weights, whose features"),
        (cnn(), {"kind": "pq-lora"}, "--adapt pq-lora finds nothing to adapt in family 'cnn'"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)  # fmt: skip
def test_what_cannot_be_adapted_is_refused_in_one_line(spec, given, said):
    with pytest.raises(ConfigError, match=said) as refused:
        check_family(replace(spec, adapters=Adapters(**{"rank": 2} | given)))
    assert "\n" not in str(refused.value)


def build_closed(spec: ModelSpec):
    from edge_sdk.models import StagedModel

    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    head = nn.Sequential(nn.Flatten(), nn.Linear(12, spec.num_classes))
    return StagedModel([layer], [head])


def test_a_layer_of_torchs_own_is_no_target(own_things):
    from edge_sdk.models import register_family

    register_family("closed", build_closed)
    spec = ModelSpec(family="closed", input_shape=(3, 4), num_classes=2, exit=1)
    with pytest.raises(ConfigError, match="stages.0.linear1 lie inside a layer of torch's own"):
        check_family(replace(spec, adapters=Adapters(kind="lora", targets=("linear1",), rank=2)))
    with pytest.raises(ConfigError, match="finds nothing to adapt in family 'closed'"):
        check_family(replace(spec, adapters=Adapters(kind="lora", rank=2)))
