"""Who adds a method, a rule, a generator or a family is told what lacks: each file registers
itself, is short and says what it is, and stands in the documents' tables."""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path

import pytest

from coordinator.aggregation.registry import RULES
from coordinator.generators.registry import GENERATORS
from coordinator.methods.registry import METHODS, defaults_of
from coordinator.settings import changed, checked, flags_of
from edge_sdk.models import FAMILIES
from edge_sdk.models.options import described
from tests.support.documents import blocks, first_cells
from tests.support.examples import config
from tests.support.processes import ROOT

KINDS = {registry.kind: registry for registry in (METHODS, RULES, GENERATORS, FAMILIES)}
EVERY = [(kind, name) for kind, registry in KINDS.items() for name in registry]
PAGE = ROOT / "docs" / "extending.md"
METHODS_PAGE = ROOT / "docs" / "methods.md"
MOST_LINES = 150


def file_of(kind: str, name: str) -> Path:
    module = KINDS[kind]._modules[name]
    return ROOT / f"{module.replace('.', '/')}.py"


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_file_registers_the_name_that_is_read_in_it(kind, name):
    registry = KINDS[kind]
    registry[name]
    assert name in registry._entries
    assert importlib.import_module(registry._modules[name]).__doc__


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_short_file_that_says_what_it_is(name):
    text = file_of("method", name).read_text()
    assert text.count("\n") <= MOST_LINES
    assert f"`{name}`" in text.split('"""')[1], "its first lines name it"


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_settings_within_their_bounds(name):
    for is_paper in (False, True) if METHODS[name].paper else (False,):
        values = defaults_of(name, is_paper=is_paper)
        settings = changed(config(name), values)
        assert checked(settings) == settings


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_each_option_has_a_help_text(kind, name):
    options = KINDS[kind][name].options
    if options is None:
        return
    texts = described(options) if kind == "model family" else dict.fromkeys(flags_of(options), 1)
    assert set(texts) == set(options.__struct_fields__)
    assert all(texts.values())
    options()  # and a default


def test_the_documents_have_a_row_for_each():
    text = METHODS_PAGE.read_text()
    rows = {
        "method": set(first_cells(text, "Methods")) - {"hypemefed --paper"},
        "generator": {*first_cells(text, "**Generation"), "none"},
        "model family": set(first_cells(text, "Models")),
        "aggregation rule": set(first_cells((ROOT / "docs/security.md").read_text(), "Harmful")),
    }
    assert rows == {kind: set(registry) for kind, registry in KINDS.items()}
    assert set(first_cells(PAGE.read_text(), "Adding one more")) == set(KINDS)


def test_the_page_has_a_paragraph_and_the_costs_of_each_method():
    text = METHODS_PAGE.read_text()
    costs, each = (text.split(f"\n## {title}\n")[1] for title in ("What they cost", "Each method"))
    rows = "".join(
        line.split("|")[1] for line in costs.split("\n## ")[0].splitlines() if "|" in line
    )
    paragraphs = "".join(re.findall(r"^\*\*.*?\*\*", each.split("\n## ")[0], re.M | re.S))
    for name in METHODS:
        assert f"`{name}`" in rows, "what it costs"
        assert f"`{name}`" in paragraphs, "when to take it"


def test_the_table_of_families_has_their_options():
    below = METHODS_PAGE.read_text().split("\n## Models\n")[1]
    for name in FAMILIES:
        (row,) = re.findall(rf"^\| `{name}` \|.*\|(.*)\|$", below, re.M)
        assert re.findall(r"`([^`]+)`", row) == list(FAMILIES[name].options.__struct_fields__)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_kinds_tells_the_file_the_call_and_the_suite(kind):
    registry = KINDS[kind]
    (row,) = re.findall(rf"^\| `{kind}` \|(.*)\|$", PAGE.read_text(), re.M)
    file, call, example, suite = row.split(" | ")
    assert str(registry._folder.relative_to(ROOT)) in file
    assert registry._function in call
    example_path = (PAGE.parent / re.findall(r"\]\((.*)\)", example)[0]).resolve()
    assert f'{registry._function}("' in example_path.read_text()
    assert (ROOT / suite.strip(" `")).exists()


def test_the_options_on_the_page_are_flags(monkeypatch):
    (code,) = [block for block in blocks(PAGE.read_text()) if "class Mine" in block]
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # where the struct's types are looked up
    exec(code, vars(page))
    flag = flags_of(page.Mine)["decay"]
    assert (flag.name, flag.default, flag.help) == ("--decay", 0.9, "of the old average")
