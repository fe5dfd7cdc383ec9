"""What can be named: found by reading, imported when asked for, refused where it is another's."""

from __future__ import annotations

import sys

import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.registry import Registry


@pytest.fixture
def things(tmp_path, monkeypatch):
    """A package of two files that register three things, of which one cannot be imported."""
    package = tmp_path / "thing_box"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text(
        '"""With\n\n    @add_thing("of a docstring")\n"""\nfrom thing_box import add_thing\n'
        'add_thing("b", 2)\nadd_thing(\n    "a",\n    1,\n)\n'
    )
    (package / "bad.py").write_text('raise RuntimeError("imported")\n@add_thing("c")\ndef c(): ...')
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("thing", "add_thing", "thing_box", package, "; make one")
    import thing_box

    thing_box.add_thing = lambda name, value: registry.add(name, value, "thing_box.good")
    yield registry
    for name in [name for name in sys.modules if name.startswith("thing_box")]:
        del sys.modules[name]


def test_names_are_known_without_an_import(things):
    assert list(things) == ["a", "b", "c"]
    assert len(things) == 3
    assert "b" in things
    assert "of a docstring" not in things
    assert "thing_box.good" not in sys.modules


def test_a_file_is_imported_when_one_of_its_names_is_asked_for(things):
    assert (things["a"], things["b"]) == (1, 2)
    with pytest.raises(RuntimeError, match="imported"):
        things["c"]


def test_an_unknown_name_lists_the_known(things):
    with pytest.raises(ConfigError, match="^unknown thing 'd'; known: a, b, c; make one$"):
        things["d"]


def test_a_name_is_registered_once(things):
    things.add("mine", 5, "my_module")
    things.add("mine", 5, "my_module")  # the same again, as when a module is loaded anew
    assert things["mine"] == 5
    for name in ("mine", "a"):  # "a" is the package's, though nobody has asked for it
        with pytest.raises(ConfigError, match=f"thing '{name}' is registered already; .* in other"):
            things.add(name, 6, "other")
