"""Models of torchvision, timm and transformers by their names, randomly initialised and small."""

from __future__ import annotations

import importlib
import re
import sys

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import nn

from edge_sdk.errors import ConfigError, LackError
from edge_sdk.infer import EarlyExit
from edge_sdk.infer.export import export
from edge_sdk.models import build, find_family, initial_tensors, original_names
from edge_sdk.models.checking import check_family
from edge_sdk.models.from_module import from_module
from edge_sdk.models.staged import drawn_inputs
from edge_sdk.models.widths import slice_of
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.training.trainer import train
from tests.support.examples import examples
from tests.support.packages import package_or_skip

PACKAGES = {"torchvision": "torchvision", "timm": "timm", "huggingface": "transformers"}
BERT = "hidden_size=8,num_hidden_layers=3,num_attention_heads=2,intermediate_size=12"
LLAMA = f"{BERT},num_key_value_heads=1"
IMAGES = {"input_shape": (3, 32, 32)}
TEXT = {"input_shape": (6,), "vocabulary": 11}
NEXT = {**TEXT, "num_classes": 11, "task": "tokens"}
LAYERS = "layer1,layer2,layer4"


def spec(name: str, cuts: str = "auto:3", config: str = "", **about) -> ModelSpec:
    family, _, model = name.partition(":")
    package_or_skip(PACKAGES[family])
    options = {"model": model, "cuts": cuts} | ({"config": config} if config else {})
    fields = {"num_classes": 3, "exit": 3, "options": options} | about
    return ModelSpec(family=family, **fields)


CASES = {
    "mobilenet": ("torchvision:mobilenet_v3_small", "auto:3", "", IMAGES),
    "resnet": ("torchvision:resnet18", LAYERS, "", IMAGES),
    "efficientnet": ("torchvision:efficientnet_b0", "auto:3", "", IMAGES),
    "timm-vit": ("timm:test_vit", "auto:3", "", IMAGES),
    "timm-resnet": ("timm:test_resnet", "auto:3", "", {"input_shape": (1, 32, 32)}),
    "bert": ("huggingface:bert", "auto:3", BERT, TEXT),
    "llama": ("huggingface:llama", "auto:3", LLAMA, NEXT),
}


@pytest.mark.parametrize("case", CASES)
def test_the_last_exit_gives_what_the_model_gives(case):
    """The same weights, as both are drawn first from one seed. Of bert, which has no head, the
    features behind the last cut."""
    name, cuts, config, about = CASES[case]
    given = spec(name, cuts, config, **about)
    family = find_family(given.family)
    make = importlib.import_module(family.build.__module__).make
    build(given)  # auto cuts are found once
    torch.manual_seed(0)
    model = build(given).eval()
    torch.manual_seed(0)
    module = make(given, family.options(**given.options)).eval()
    x = drawn_inputs(given, 3)
    with torch.no_grad():
        wanted = module(x)
        found = nn.Sequential(*model.stages)(x) if case == "bert" else model(x)[-1]
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted[0]
    assert torch.allclose(found, wanted, atol=1e-5)
    names = original_names(given)
    held = {n: t for n, t in module.state_dict().items() if "num_batches_tracked" not in n}
    prefix = "bert." if case == "bert" else ""
    for tensor, original in names.items():
        assert model.tensors()[tensor].shape == held[original.removeprefix(prefix)].shape
    lacking = {f"{prefix}{n}" for n in held} - set(names.values())
    assert not {n for n in lacking if "pooler" not in n}


@pytest.mark.parametrize("case", ["timm-vit", "bert"])
def test_they_pass_every_check_and_train(case):
    name, cuts, config, about = CASES[case]
    given = spec(name, cuts, config, **about)
    check_family(given)
    whole = initial_tensors(given, 0)
    part = {n for n in whole if stage_of(n)[1] <= 2}
    assert part == set(build(replace(given, exit=2)).tensors())
    if not given.vocabulary:
        plan = Plan(segments=(Segment(first=1, last=3),), batch_size=4)
        found = train(given, plan, whole, examples(8, shape=given.input_shape))
        assert all(not torch.equal(found.tensors[name], whole[name]) for name in part)


@pytest.mark.parametrize("case", ["timm-resnet"])
def test_they_are_exported_and_answer(case, tmp_path):
    name, cuts, config, about = CASES[case]
    given = spec(name, cuts, config, **about)
    tensors = initial_tensors(given, 0)
    export(given, tensors, tmp_path / "model")
    x = drawn_inputs(given, 3).numpy()
    engine = EarlyExit.load(tmp_path / "model", threshold=0.0)
    model = build(given).eval()
    model.load(tensors)
    with torch.no_grad():
        wanted = model(torch.from_numpy(x))[0].numpy()
    found = engine.predict(x)
    assert found.exit.tolist() == [1, 1, 1]
    assert found.label.tolist() == np.argmax(wanted, axis=1).tolist()


def test_a_vision_transformer_of_torchvision_has_class_token_exits():
    models = package_or_skip("torchvision").models
    sizes = {"num_layers": 3, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12}
    module = models.VisionTransformer(image_size=16, patch_size=8, num_classes=3, **sizes).eval()
    x = torch.rand(2, 3, 16, 16)
    wanted = module(x)
    about = {"input_shape": (3, 16, 16), "num_classes": 3}
    layers = [f"encoder.layers.encoder_layer_{number}" for number in range(2)]
    model = from_module(module, [*layers, "encoder"], exits="class-token", **about).eval()
    assert [tuple(z.shape) for z in model(x)] == [(2, 3)] * 3
    assert torch.allclose(model(x)[-1], wanted, atol=1e-6)
    assert "stages.0.class_token" in model.tensors()
    assert not [name for name in model.main_weights if "pos_embedding" in name]


def test_a_mobilenet_has_widths():
    given = spec("torchvision:mobilenet_v2", "features.1,features.3", exit=2, **IMAGES)
    held = slice_of(given, 0.5)
    kept = held["stages.0.features.0.0.weight"][0]
    assert kept.tolist() == list(range(16)), "of 32"


@pytest.mark.parametrize(
    ("name", "about", "line"),
    [
        ("torchvision:mobilenet_v3", IMAGES, "no model 'mobilenet_v3'; nearest: mobilenet_v2"),
        ("torchvision:", IMAGES, "no model is named; name one of torchvision"),
        ("torchvision:resnet18", {"input_shape": (5,)}, "take images (C, H, W), got (5,)"),
        ("torchvision:resnet18", IMAGES | {"width": 0.5}, "width 0.5: a model of torchvision"),
        ("timm:resnet81", IMAGES, "timm has no model 'resnet81'; nearest: resnet18"),
        ("huggingface:brt", TEXT, "has no model 'brt'; nearest: "),
        ("huggingface:bert", TEXT | {"input_shape": (600,)}, "max_position_embeddings 512, the"),
    ],
)
def test_wrong_models_are_told_in_one_line(name, about, line):
    with pytest.raises(ConfigError, match=re.escape(line)) as raised:
        build(spec(name, **about))
    assert "\n" not in str(raised.value)


def test_a_wrong_key_of_a_configuration():
    with pytest.raises(ConfigError, match="no 'hiden_size' in config; nearest: hidden_size"):
        build(spec("huggingface:bert", config="hiden_size=8", **TEXT))


def test_cuts_must_be_said():
    with pytest.raises(ConfigError, match="cuts are not said; give --cuts auto"):
        build(spec("torchvision:resnet18", "", **IMAGES))


@pytest.mark.parametrize(("family", "package"), PACKAGES.items())
def test_a_package_that_is_not_installed_is_told(family, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    options = {"model": "any", "cuts": "a"}
    given = ModelSpec(family=family, num_classes=3, exit=1, options=options, **IMAGES)
    with pytest.raises(LackError, match=f"{package}, which is not installed; pip install"):
        build(given)
