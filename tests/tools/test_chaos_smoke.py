"""The chaos suite in short, where the kernel allows: one run over a bad link, in which the link is
cut in an upload and the coordinator is killed in a training. The rest is `make test-chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.bed import bed_of
from tests.chaos.ledger import TOLERANCE, read_ledger, replayed
from tests.chaos.net import what_is_missing

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing())
def test_cut_link_and_killed_coordinator(tmp_path: Path) -> None:
    with bed_of(tmp_path, 2, "--epochs", "6") as bed:
        bed.start_all()
        first = bed.wait_phase("a", "upload", is_cut=True)
        bed.net.mend(bed.links["a"])
        bed.wait_round(first)
        bed.forget()
        second = bed.wait_phase("b", "train", is_cut=False)
        bed.kill_server()
        bed.serve_until_listening()
        bed.wait_round(second)
        bed.stop()
        ledger = read_ledger(bed)
        assert not ledger.problems
        assert {bed.outcomes("a")[first], bed.outcomes("b")[second]} == {"ok"}
        differences = replayed(bed, [first, second])
        assert max(differences.values()) < TOLERANCE
        other_seed = replayed(bed, [first], seed_shift=1)
        assert min(other_seed.values()) > 100 * TOLERANCE, "the comparison would see nothing"
