"""Modules that were not written in stages, cut by the names of their own modules."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models import initial_tensors, register_family
from edge_sdk.models.checking import check_family
from edge_sdk.models.from_module import from_module, module_names
from edge_sdk.models.widths import slice_of
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.training.trainer import train
from tests.edge_sdk.models.own_modules import Residual, Series, Text
from tests.support.examples import examples

IMAGES = {"input_shape": (3, 8, 8), "num_classes": 4}
SERIES = {"input_shape": (2, 16), "num_classes": 3}
TEXT = {"input_shape": (6,), "num_classes": 5, "vocabulary": 11}
LAYERS = ["stem", "layer1", "layer2"]


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ids(count: int = 3) -> Tensor:
    return torch.randint(0, 11, (count, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "cuts", "about", "x"),
    [
        (Residual, LAYERS, IMAGES, lambda: images(5)),
        (Residual, ["layer1.0", "layer2.1"], IMAGES, lambda: images(5)),
        (Series, ["net.1", "net.3", "net"], SERIES, lambda: torch.rand(5, 2, 16)),
        (Text, ["layers.0", "layers.2"], TEXT, lambda: ids(5)),
    ],
    ids=["residual", "in-layers", "series", "text"],
)
def test_the_last_exit_gives_what_the_module_gave(make, cuts, about, x):
    """In eval mode, and in training mode by the same draws."""
    module, x = make(), x()
    whole = copy.deepcopy(module)
    model = from_module(module, cuts, **about)
    for is_training in (False, True):
        torch.manual_seed(7)
        wanted = whole.train(is_training)(x)
        torch.manual_seed(7)
        logits = x
        for stage in model.train(is_training).stages:
            logits = stage(logits)
        logits = model.exits[-1](logits)
        assert torch.allclose(logits, wanted["logits"] if isinstance(wanted, dict) else wanted)


def test_tensors_keep_their_names_behind_that_of_the_stage():
    model = from_module(Residual(), LAYERS, **IMAGES)
    held = dict(Residual().named_parameters()) | dict(Residual().named_buffers())
    names = module_names(model)
    assert names["stages.1.layer1.0.conv1.weight"] == "layer1.0.conv1.weight"
    assert names["exits.2.fc.bias"] == "fc.bias"
    wanted = {name for name in held if "num_batches_tracked" not in name}
    assert set(names.values()) == wanted
    fresh = set(model.tensors()) - set(names)
    assert fresh == {f"exits.{n}.2.{kind}" for n in (0, 1) for kind in ("weight", "bias")}


@pytest.mark.parametrize("exit", [1, 2])
def test_a_prefix_holds_nothing_of_deeper_stages(exit):
    whole = from_module(Residual(), LAYERS, **IMAGES)
    part = from_module(Residual(), LAYERS, exit=exit, **IMAGES)
    wanted = {
        name: tensor.shape
        for name, tensor in whole.tensors().items()
        if int(name.split(".")[1]) < exit
    }
    assert {name: tensor.shape for name, tensor in part.tensors().items()} == wanted
    assert part.main_weights == tuple(name for name in whole.main_weights if name in wanted)
    assert not [m for m in part.modules() if isinstance(m, nn.Linear) and m.out_features != 4]
    assert part.cuts == whole.cuts == tuple(LAYERS)
    assert part.whole_bytes == whole.whole_bytes


def test_the_modules_weights_and_what_is_frozen_stay():
    module = Residual()
    module.stem.requires_grad_(False)
    weight = module.layer1[0].conv1.weight
    model = from_module(module, LAYERS, **IMAGES)
    assert model.get_parameter("stages.1.layer1.0.conv1.weight") is weight
    assert [p.requires_grad for p in model.stages[0].parameters()] == [False, False]


def test_exits_by_the_form_of_the_features():
    shapes = {}
    model = from_module(Text(), ["embed", "layers.1"], exits="class-token", keep_head=False, **TEXT)
    shapes["text"] = [tuple(z.shape) for z in model(ids())]
    series = from_module(Series(), ["net.3", "net"], keep_head=False, **SERIES)
    shapes["series"] = [tuple(z.shape) for z in series(torch.rand(3, 2, 16))]
    assert shapes == {"text": [(3, 5)] * 2, "series": [(3, 3)] * 2}
    assert [head[-1].in_features for head in series.exits] == [4, 8], "channels, not positions"


def test_exits_of_tokens():
    """Of (1, 2, 3) tokens [1, 3, 5] and [9, 9, 0]: normalised, by each kind."""
    taken = {}
    for kind in ("pool-linear", "class-token", "last-token"):
        model = from_module(Text(), ["layers.1"], exits=kind, keep_head=False, **TEXT)
        head = model.exits[0]
        nn.init.eye_(head.linear.weight)
        nn.init.zeros_(head.linear.bias)
        head.norm = nn.Identity()
        x = torch.tensor([[[1.0, 3.0, 5.0, 7.0], [9.0, 9.0, 0.0, 1.0]]])
        taken[kind] = head(x)[0, :4].tolist()
    assert taken == {
        "pool-linear": [5, 6, 2.5, 4],
        "class-token": [1, 3, 5, 7],
        "last-token": [9, 9, 0, 1],
    }


def test_every_token_has_outputs_where_the_task_is_of_tokens():
    model = from_module(Text(), ["embed"], task="tokens", **TEXT)
    assert [tuple(z.shape) for z in model(ids())] == [(3, 6, 5)]


def test_exits_of_a_function():
    seen = []

    def make(shape, outputs):
        seen.append((shape, outputs))
        return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], outputs))

    model = from_module(Residual(), LAYERS, exits=make, keep_head=False, **IMAGES)
    assert seen == [((4, 8, 8), 4), ((4, 8, 8), 4), ((8, 4, 4), 4)]
    assert [tuple(z.shape) for z in model(images())] == [(3, 4)] * 3


@pytest.mark.parametrize(
    ("make", "cuts", "about", "line"),
    [
        (Residual, ["layer3"], IMAGES, "cut 'layer3': there is no such module; nearest: layer"),
        (Residual, ["layer1.0.conv1", "layer2"], IMAGES, "layer1.0.skip (Conv2d) uses what "),
        (
            Residual,
            ["layer1.0.conv1", "layer2"],
            IMAGES,
            "what stem (Sequential) gives, past the cut 'la",
        ),
        (Residual, ["layer2", "layer1"], IMAGES, "cut 'layer1' does not follow 'layer2'"),
        (Residual, ["layer1", "layer1.1"], IMAGES, "cut 'layer1.1' does not follow 'layer1'"),
        (Residual, ["layer1", "layer1"], IMAGES, "expected names of different modules"),
        (Residual, [], IMAGES, "cuts (), expected names of different modules"),
        (Residual, "layer1", IMAGES, "cuts 'layer1', expected names of modules, or \"auto:4\""),
        (Residual, "auto:9", IMAGES, "it has 5 places where one tensor passes, expected 9"),
        (Residual, ["layer1.0.relu"], IMAGES, "cut 'layer1.0.relu' runs 2 times; nearest: "),
        (Text, ["positions", "norm"], TEXT, "cut 'positions' gives (1, 7, 4) for 2 examples, exp"),
    ],
)
def test_what_cannot_be_cut_is_told_in_one_line(make, cuts, about, line):
    with pytest.raises(ConfigError, match=re.escape(line)) as raised:
        from_module(make(), cuts, **about)
    assert "\n" not in str(raised.value)


class Odd(nn.Module):
    """x (B, 6) through two linear layers and something that a cut module would do otherwise."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.one, self.two, self.what = nn.Linear(6, 6), nn.Linear(6, 6), what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "no_grad":
            with torch.no_grad():
                return self.two(self.one(x))
        x = self.one(x)
        if self.what == "values" and x.sum() > 0:
            x = x + 1
        if self.what == "mode" and self.training:
            x = x.relu()
        if self.what == "batch":
            x = x * (len(x) + 1)
        if self.what == "view":
            part = x[:, 0]
            part += 1
        if self.what == "twice":
            return self.one(x)
        return self.two(x)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("no_grad", "one (Linear) runs without gradients"),
        ("values", "depends on the values of a tensor (__bool__) in Odd"),
        ("mode", "in training it does other things (relu in Odd) than else (two (Linear))"),
        ("batch", "mul in Odd takes 3 for 2 examples and 4 for 3"),
        ("view", "another view of it was written in place in Odd"),
        ("twice", "cut 'one' runs 2 times"),
    ],
)
def test_what_a_cut_module_would_do_otherwise_is_refused(what, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        from_module(Odd(what), ["one"], input_shape=(6,), num_classes=6)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.one, self.same = nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.one(self.same(x)))
        return self.act(self.two(self.same(x)))


def test_a_layer_that_two_stages_use_is_refused_and_one_without_weights_is_copied():
    about = {"input_shape": (6,), "num_classes": 6}
    with pytest.raises(ConfigError, match=r"same \(Linear\) is used before and behind a cut"):
        from_module(Shared(), ["one", "two"], **about)
    module = Shared()
    module.same = nn.Identity()
    model = from_module(module, ["one", "two"], **about)
    assert isinstance(model.exits[1].act, nn.ReLU)
    assert isinstance(model.stages[1].act, nn.ReLU)
    assert model.stages[1].act is not model.exits[1].act


def test_cutting_disturbs_neither_draws_nor_the_module():
    module = Residual()
    module.layer1.eval()
    before = copy.deepcopy(module.state_dict())
    state = torch.random.get_rng_state()
    from_module(module, LAYERS, exits=lambda shape, outputs: nn.Flatten(), **IMAGES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert module.training
    assert not module.layer1.training
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)


def test_auto_cuts_at_equal_operations():
    """Six layers of 64, 16, 16, 16, 16 and 64 multiply-adds for 3 exits: the head, the last one, is
    no stage's; of 128 / 3 the nearest places are at 64 and 80 of what comes before it."""
    sizes = [(8, 8), (8, 2), (2, 8), (8, 2), (2, 8), (8, 8)]
    layers = [nn.Linear(*size) for size in sizes]
    module = nn.Sequential(*layers)
    model = from_module(module, "auto:3", input_shape=(8,), num_classes=8)
    assert model.cuts == ("0", "1", "4")


def test_auto_cuts_behind_blocks_and_before_the_head():
    model = from_module(Residual(), "auto:2", **IMAGES)
    assert model.cuts == ("layer1", "layer2")
    assert len(from_module(Text(), "auto:3", **TEXT).cuts) == 3


def build(spec: ModelSpec):
    make = {"residual": Residual, "series": Series, "text": Text}[spec.family]
    return from_module(
        make(),
        {"residual": LAYERS, "series": ["net.1", "net.3", "net"]}.get(spec.family, "auto:3"),
        input_shape=spec.input_shape,
        num_classes=spec.num_classes,
        exit=spec.exit,
        vocabulary=spec.vocabulary,
    )


@pytest.mark.parametrize(("family", "about"), [("residual", IMAGES), ("series", SERIES)])
def test_as_a_family_they_pass_every_check_and_train(family, about, own_things):
    register_family(family, build)
    spec = ModelSpec(family=family, exit=3, **about)
    check_family(spec)
    plan = Plan(segments=(Segment(first=1, last=3),), batch_size=4)
    whole = initial_tensors(spec, 0)
    data = examples(8, shape=spec.input_shape)
    found = train(spec, plan, whole, data)
    assert set(found.tensors) == set(whole)
    again = train(spec, replace(plan, recompute=True), whole, data)
    assert all(torch.equal(again.tensors[name], found.tensors[name]) for name in whole)


def test_widths_are_followed_where_the_module_has_them(own_things):
    class Narrow(nn.Module):
        def __init__(self, width: float) -> None:
            super().__init__()
            channels = round(8 * width)
            self.one = nn.Sequential(nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())
            self.two = nn.Sequential(nn.Conv2d(channels, channels, 3), nn.ReLU())
            self.fc = nn.Linear(channels, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.two(self.one(x)).mean((2, 3)))

    def build_narrow(spec: ModelSpec):
        about = {"input_shape": (1, 8, 8), "num_classes": 3, "exit": spec.exit}
        return from_module(Narrow(spec.width), ["one", "two"], **about)

    register_family("narrow", build_narrow)
    spec = ModelSpec(family="narrow", input_shape=(1, 8, 8), num_classes=3, exit=2)
    held = slice_of(spec, 0.5)
    assert held["stages.1.two.0.weight"][0].tolist() == [0, 1, 2, 3]
    assert held["exits.1.fc.weight"][1].tolist() == [0, 1, 2, 3]


class Aside(nn.Module):
    """Its head also takes what never passes the layer `one`."""

    def __init__(self):
        super().__init__()
        self.one, self.side, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.one(x) + self.side(x))


def test_a_head_that_takes_more_than_the_cut_is_told():
    model = from_module(Aside(), ["one"], input_shape=(4,), num_classes=3)
    assert "use more than what passes the cut 'one', so the last exit is a new one" in model.doubt
    assert not any("head" in name for name in module_names(model).values())
    plain = from_module(Aside(), ["one"], input_shape=(4,), num_classes=3, keep_head=False)
    assert not plain.doubt
