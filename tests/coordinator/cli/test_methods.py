"""`edge-coordinator methods`: what each method does and asks of a device."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from coordinator.cli.main import main
from coordinator.cli.methods import needs
from coordinator.cohorts.budget import chosen_variants
from coordinator.cohorts.population import exits_of
from coordinator.methods.registry import METHODS, make_method
from coordinator.registry import OPT_IN, OnDevice, Registered
from coordinator.runs import emulating
from coordinator.settings import shaped, shared_flags
from tests.support.processes import ROOT


def test_every_method_has_its_lines(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in METHODS:
        (at,) = [n for n, line in enumerate(lines) if line.split()[:1] == [name]]
        assert lines[at].split(maxsplit=1)[1] == METHODS[name].about
        assert lines[at + 1].strip() == needs(METHODS[name])


def test_one_of_your_own_is_listed_too(own_things, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    assert main(["methods", "--import", "own_method"]) == 0
    assert "\nwarm-up " in capsys.readouterr().out


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_does_and_asks_for(name):
    method = METHODS[name]
    assert method.about.endswith(".")
    assert len(method.about) <= 90
    assert method.on_device
    known = {*shared_flags(), *(path.split(".")[0] for path in shared_flags())}
    assert {*method.uses, *method.without} <= known, "settings that there are"
    assert set(method.uses) <= set(OPT_IN), "others count without being named"


def test_what_it_asks_for_in_words():
    plain = Registered(print, on_device=OnDevice("width", "about w M", "w^2 K"))
    assert needs(plain) == "fits by: width; memory about w M; traffic w^2 K"
    own = Registered(print, on_device=OnDevice("mask", "M", "s K", "its mask"), is_personal=True)
    assert needs(own) == "fits by: mask; memory M; traffic s K; keeps its mask; personal"
    assert needs(Registered(print)) == "it does not say what it asks of a device"


def test_places_of_shared_settings():
    def places(**registered):
        method = Registered(print, **registered)
        paths = ("rotation.mode", "server.damping", "server.lr", "weighting")
        return [path for path in paths if method.has_place(path)]

    assert places() == ["server.lr", "weighting"]
    assert places(uses=("rotation", "server.damping")) == [
        "rotation.mode",
        "server.damping",
        "server.lr",
        "weighting",
    ]
    assert places(without=("server",), uses=("server.damping",)) == ["weighting"]
    assert places(without=("server.lr", "weighting")) == []


def test_each_command_of_the_page_has_a_model_for_some_client(monkeypatch):
    """Of a method that offers several, by the memory of the emulated groups or by --variants."""
    text = (ROOT / "docs" / "methods.md").read_text()
    asked = []
    monkeypatch.setattr(emulating, "emulate", lambda *settings: asked.append(settings))
    for name in ("scalefl", "heterofl", "fedrolex", "fedhm", "lotteryfl", "mh-pfedhn"):
        (line, *_) = re.findall(rf"^    edge-coordinator (emulate --method {name} .*)$", text, re.M)
        assert main(line.split()) == 0
    for config, population, _ in asked:
        config = shaped(config, (1, 8, 8), 10)
        offer, exits = make_method(config).offer(), exits_of(population, config.model.exit)
        assert offer.variants
        plain = replace(config.plan(config.rounds), optimizer="adam")  # as emulated_cohort has it
        assert chosen_variants(offer, config.model, plain, exits, population.variants)
