"""Training steps of every family in a process of their own, so that a fault in torch's native code
is a failed test and not the end of the suite."""

from __future__ import annotations

import pytest

from tests.contract.families import TABLE, check_trains_apart, fault_apart, training_fault


@pytest.mark.parametrize("family", sorted(TABLE))
def test_training_neither_crashes_nor_hangs(family):
    check_trains_apart(family)


def test_training_neither_crashes_nor_hangs_with_avx2():
    """On a CPU with AVX2 but no AVX-512 torch 2.13 corrupted the heap in resnet18's shortcuts."""
    assert training_fault(*sorted(TABLE), with_avx2=True) == ""


BEGUN = "print('input (1, 2)', flush=True); import os, signal, sys; "


@pytest.mark.parametrize(
    ("then", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV in input (1, 2)\n"),
        ("os.abort()", "ended by SIGABRT in input (1, 2)\n"),
        ("sys.exit('no such input')", "exit status 1 in input (1, 2)\nno such input\n"),
        ("pass", ""),
    ],
)
def test_a_fault_tells_how_and_where(then, told):
    assert fault_apart(["-c", BEGUN + then], {}, 60.0) == told


def test_a_hang_is_a_fault():
    told = fault_apart(["-c", "import signal; signal.pause()"], {}, 0.5)
    assert told == "still running after 0.5 s in its start\n"


def test_a_program_apart_has_its_variables():
    program = "import os, sys; sys.exit(os.environ['KERNELS'] + '!')"
    assert fault_apart(["-c", program], {"KERNELS": "old"}, 60.0).endswith("\nold!\n")
