"""Random faults, for as long as you like.

python -m tests.faults --rounds 200                     all faults in turn
python -m tests.faults --rounds 20 --only disk_full     one of them
python -m tests.faults --seed 5 --rounds 1              the round that was called seed 5
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.faults import FAULTS, clean, why_not
from tests.faults.harness import Bench

KINDS = ("lost", "differs", "rough")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first round; then one more each"
    )
    parser.add_argument("--only", choices=FAULTS, action="append", help="may be given repeatedly")
    asked = parser.parse_args()

    possible = []
    for name in FAULTS if asked.only is None else asked.only:
        if reason := why_not(FAULTS[name]):
            print(f"skipped: {name}, {reason}")
        else:
            possible.append(name)
    if not possible:
        return 0

    rounds: Counter[str] = Counter()
    complaints: Counter[tuple[str, str]] = Counter()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gptforge-faults-") as folder:
        bench = Bench(Path(folder))
        for seed in range(asked.seed, asked.seed + asked.rounds):
            # The seed alone says which fault, so that one round can be had again.
            name = possible[seed % len(possible)]
            since = time.perf_counter()
            case = FAULTS[name](bench, random.Random(seed))
            clean(case)
            rounds[name] += 1
            complaints.update({(name, kind) for kind in {c.kind for c in case.complaints}})
            said = "; ".join(f"{c.kind}: {c.what}" for c in case.complaints)
            seconds = time.perf_counter() - since
            print(f"seed {seed:4d}  {name:20s} {seconds:5.1f} s  {said or 'well'}", flush=True)

    print(f"\n{'fault':20s} rounds" + "".join(f"{kind:>9s}" for kind in KINDS))
    for name in possible:
        counts = "".join(f"{complaints[name, kind]:9d}" for kind in KINDS)
        print(f"{name:20s} {rounds[name]:6d}{counts}")
    seconds = time.perf_counter() - begin
    print(f"{sum(rounds.values())} rounds in {seconds:.0f} s")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
