"""Tests in several processes: a crash of native code is a failed test, with its last words.

    python -m pytest -n 2 --capture sys

Each process takes whole files, so what a module's fixtures hold is made once. Its stderr is a file
of its own, to which native code (unless pytest captures it, too) and faulthandler write; the end of
it is shown beside a test that failed, and at the end of the output for a process that died. Without
-n nothing here acts.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

MACHINE = "tests/system/"  # one after the other, and first, as they take longest
LAST_BYTES = 20_000
PLUGIN = "crashes of the processes"


def pytest_configure(config: pytest.Config) -> None:
    told = getattr(config, "workerinput", None)
    if told is not None:
        config.pluginmanager.register(Process(Path(told["stderr"])))
    elif config.getoption("numprocesses", None):
        config.pluginmanager.register(Processes(), PLUGIN)


class Processes:
    """What the process does that has started the others."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="edge-sdk-tests-"))
        self._crashes: list[tuple[str, str]] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["stderr"] = str(self._folder / node.gateway.id)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        from xdist.scheduler import LoadFileScheduling

        class ByFile(LoadFileScheduling):
            def _split_scope(self, nodeid: str) -> str:
                return MACHINE if nodeid.startswith(MACHINE) else super()._split_scope(nodeid)

            def remove_node(self, node: Any) -> str | None:
                """The test that was running when the process died; it is not run again."""
                for unit in self.assigned_work[node].values():
                    for nodeid, is_done in unit.items():
                        if not is_done:
                            unit[nodeid] = True
                            super().remove_node(node)
                            return nodeid
                return super().remove_node(node)

        return ByFile(config, log)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        if error:
            name = node.gateway.id
            self._crashes.append((name, last_words(self._folder / name)))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._crashes and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED  # it died beside its tests

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for name, words in self._crashes:
            terminalreporter.section(f"process {name} died; the end of its stderr", red=True)
            terminalreporter.write_line(words)

    def pytest_unconfigure(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class Process:
    """What each of the others does. stderr: its file."""

    def __init__(self, stderr: Path) -> None:
        self._stderr, self._begin = stderr, 0
        file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 2)
        os.close(file)
        faulthandler.enable(2)

    def pytest_runtest_setup(self) -> None:
        self._begin = self._stderr.stat().st_size

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Any:
        report = yield
        if report.failed and (words := last_words(self._stderr, self._begin)):
            report.sections.append(("Stderr of the process", words))
        return report


def last_words(stderr: Path, begin: int = 0) -> str:
    with stderr.open("rb") as file:
        file.seek(max(begin, stderr.stat().st_size - LAST_BYTES))
        return file.read().decode(errors="replace").strip()
