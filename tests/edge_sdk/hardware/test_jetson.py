"""jetson-stats: what it tells, what it refuses in one line, and boards without it."""

import types

import pytest

from edge_sdk.hardware import jetson
from edge_sdk.hardware.jetson import JetsonStats, explained, jetson_stats
from tests.support.jtop_fake import JtopException, fake_jtop, orin, refuses


@pytest.fixture(autouse=True)
def _forget():
    yield
    jetson.jetson_module.cache_clear()


def test_all_that_is_told(monkeypatch):
    fake_jtop(monkeypatch, orin)
    assert jetson_stats() == JetsonStats(
        module="NVIDIA Jetson Orin Nano (8GB ram)",
        temperatures={"cpu": 51.5},  # the GPU's sensor is off
        power_w=5.12,
        gpu_percent=12.5,
    )
    assert jetson.jetson_module() == "NVIDIA Jetson Orin Nano (8GB ram)"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("board", {}),
        ("board", {"hardware": {"Module": None}}),
        ("temperature", {"cpu": 51.5}),  # without the dictionary of later versions
        ("temperature", None),
        ("power", ({"total": 1}, {})),
        ("power", {"tot": {"power": "much"}}),
        ("gpu", {}),
        ("gpu", {"gpu": {"status": None}}),
    ],
)
def test_what_a_version_does_not_tell_is_unknown_and_the_rest_stays(monkeypatch, name, value):
    there = orin()
    setattr(there, name, value)
    fake_jtop(monkeypatch, lambda: there)
    field = {"board": "module", "temperature": "temperatures", "power": "power_w"}
    lost = field.get(name, "gpu_percent")
    stats = jetson_stats()
    assert not getattr(stats, lost)
    others = {"module", "temperatures", "power_w", "gpu_percent"} - {lost}
    assert all(getattr(stats, other) for other in others)
    assert stats.problem == ""


def test_a_bare_object_tells_nothing(monkeypatch):
    fake_jtop(monkeypatch, types.SimpleNamespace)
    assert jetson_stats() == JetsonStats()


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (
            JtopException(
                "The jtop.service is not active. Please run:\nsudo jtop --install-service"
            ),
            "jetson-stats: The jtop.service is not active. Please run: sudo jtop --install-service",
        ),
        (OSError("socket"), "jetson-stats: socket"),
        (EOFError(), "jetson-stats: no reason given"),
    ],
)
def test_refused_is_one_line_and_no_error(monkeypatch, error, problem):
    fake_jtop(monkeypatch, refuses(error))
    assert jetson_stats() == JetsonStats(problem=problem)
    assert jetson.jetson_module() == ""


def test_not_installed_is_no_problem(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jtop", None)
    assert jetson_stats() == JetsonStats()


INSTALL = "install one version for both (sudo pip install -U jetson-stats), then sudo jtop"


def test_a_version_mismatch_says_which_and_what_to_do():
    line = explained(
        "Mismatch version jtop service: [4.2.1] and client: [4.3.2]. Please run:\n\n"
        "sudo jtop --install-service"
    )
    assert line.startswith(
        "jetson-stats: its service has version 4.2.1, the package of this Python 4.3.2; " + INSTALL
    )
    assert "\n" not in line


def test_a_mismatch_without_versions():
    line = explained("Mismatch of Python versions between library and service")
    assert line.startswith(
        f"jetson-stats: Mismatch of Python versions between library and service; {INSTALL}"
    )
