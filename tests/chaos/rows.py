"""Answers queries on a run's database, one JSON line each, from inside the mount namespace that the
run lives in: SQLite follows /proc/PID/root back to the outside.

    python -m tests.chaos.rows RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.processes import read_rows

if __name__ == "__main__":
    for line in sys.stdin:
        query, values = json.loads(line)
        print(json.dumps(read_rows(Path(sys.argv[1]), query, *values)), flush=True)
