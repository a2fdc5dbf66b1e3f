"""The service under kills, races, full disks and hostile clients: RELIABILITY's figures, on SQLite and on PostgreSQL.

    python benchmarks/reliability.py --json reliability.json
    python benchmarks/reliability.py --only kills,race --kills 200
    python benchmarks/reliability.py --only once --operations 100000

A real server process over an engine process without a model. `kills`: the server and its engine are killed at random
moments while clients ask, leave and administer; at the next start nothing acknowledged is missing, every reservation
is settled once, the chains are whole (4, 7, 33). `once`: many clients send again, leave and are cut off by kills;
nothing is paid twice or not at all (6). `race`: 64 at once against a budget (8). `leave`: clients leave at random
tokens (7, 9). `disk`: a file system of 4 MB fills up and is made larger (5). `streams`: 1,000 at once through the
transport alone, beside bare uvicorn (14); `whole_path`: the same through everything, for information. `readers`: 100
that stop reading (16). `engine`: the engine process is killed (12). `probes`: `/live` and `/ready` while the real
engine reads long prompts, and while it is stopped (13). `sigterm`: the server is ended under all kinds of clients
(17). `clock`: it jumps by a day (29). `loris`: 500 that send no header to its end (15). `refused`: the time that a
refusal costs (35). `tamper`: rows of the ledger are changed, removed, cut off (30). `secrets`: keys and prompts in
logs and files (28).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import reliability_clients
import reliability_clock
import reliability_ledger
import reliability_once
import reliability_process
from reliability_server import Part

PARTS: dict[str, Part] = {
    **reliability_ledger.PARTS,
    **reliability_once.PARTS,
    **reliability_clients.PARTS,
    **reliability_process.PARTS,
    **reliability_clock.PARTS,
}


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--kills", type=int, default=200, help="and the size of the others in proportion")
    parser.add_argument("--operations", type=int, default=100_000, help="of 'once'; killed every 2,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three kills, 1,000 operations, SQLite alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sizes = {"kills": 3, "operations": 1000} if options.quick else vars(options)
    kinds = ["sqlite"] if options.quick else options.databases.split(",")
    measured: dict[str, dict[str, Any]] = {}
    short: list[dict[str, Any]] = []
    for name in options.only.split(","):
        if name not in PARTS:
            parser.error(f"no part '{name}'; known: {', '.join(PARTS)}")
        part = PARTS[name]
        for kind in kinds if part.differs else kinds[:1]:
            found = part.run(kind, sizes[part.size], random.Random(options.seed))
            title = f"{name} {kind}" if part.differs else name
            measured[title] = found
            print(f"{title:18} {json.dumps(found)}", flush=True)
            for target in part.targets:
                value = target.value(found)
                if not target.holds(value):
                    short.append({"name": f"{title} {target.name}", "measured": value, "target": target.wanted})
    print(f"short of target: {[entry['name'] for entry in short] or 'nothing'}")
    if options.json is not None:
        result = {"quick": options.quick, "measured": measured, "short": short}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
