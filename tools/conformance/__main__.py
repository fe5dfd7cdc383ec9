"""Does a device follow docs/protocol.md? A scripted coordinator runs it through what may happen.

    python -m tools.conformance --client 'COMMAND' [--only NAME ...] [--json FILE]
    python -m tools.conformance --write-vectors

COMMAND starts the device; in it {endpoint}, {name}, {keys} and {data} stand for the coordinator's
tcp://HOST:PORT, the device's name, a folder with device.public, device.secret and server.public,
and an .npz with x (24, 1, 4, 6) uint8 and y (24,) int64 of 4 classes. Exit status: 0 if every
scenario passed, 1 if one failed, 2 for a wrong command line."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edge_sdk.errors import ConfigError
from tools.conformance.bed import Bed, Failed
from tools.conformance.scenarios import SCENARIOS, Scenario
from tools.conformance.vectors import write_all

TOLD = 12  # of what was said, in the report of a scenario that failed


@dataclass
class Result:
    """One scenario. why: "" if it passed. said: what both sides said, in order, but heartbeats."""

    name: str
    what: str
    seconds: float = 0.0
    why: str = ""
    said: list[str] = field(default_factory=list)


def try_scenario(bed: Bed, scenario: Scenario) -> Result:
    """Run it with a client that is ready; one that failed or ended is started again before."""
    what = " ".join((scenario.__doc__ or scenario.__name__.replace("_", " ")).split())
    result, began = Result(scenario.__name__, what), time.monotonic()
    bed.said = result.said
    try:
        if not (bed.is_running and bed.is_free):
            bed.stop()
            bed.start()
            bed.make_ready()
        scenario(bed)
    except Failed as error:
        result.why = f"{error}"
        bed.stop()
    result.seconds = time.monotonic() - began
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--client", metavar="COMMAND", help="the device's command line")
    what.add_argument(
        "--write-vectors", action="store_true", help="write tests/conformance/*.json anew"
    )
    names = [scenario.__name__ for scenario in SCENARIOS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to a file")
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS", help="(60)")
    arguments = parser.parse_args(argv)
    if arguments.write_vectors:
        write_all()
        return 0
    chosen = [each for each in SCENARIOS if each.__name__ in (arguments.only or names)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            with closing(Bed(arguments.client, Path(folder), arguments.patience)) as bed:
                for scenario in chosen:
                    results.append(result := try_scenario(bed, scenario))
                    print(report(result), flush=True)
                log = bed.log.read_text(errors="replace")
        except ConfigError as error:
            parser.error(str(error))
    failed = [result for result in results if result.why]
    print(f"{len(results) - len(failed)} of {len(results)} scenarios passed")
    if failed:
        print("the client's own last lines:", *log.splitlines()[-TOLD:], sep="\n    ")
    if arguments.json:
        content = {"client": arguments.client, "scenarios": [asdict(each) for each in results]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failed else 0


def report(result: Result) -> str:
    line = f"{'FAILED' if result.why else 'passed'}  {result.name}  {result.seconds:.1f} s"
    if not result.why:
        return line
    said = "\n".join(f"        {each}" for each in result.said[-TOLD:])
    return f"{line}\n    {result.what}\n    {result.why}; before that:\n{said}"


if __name__ == "__main__":
    sys.exit(main())
