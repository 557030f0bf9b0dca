"""Inject random faults.

python -m tests.faults --rounds 200                     all faults in turn
python -m tests.faults --rounds 20 --only disk_full     one of them
python -m tests.faults --seed 5 --rounds 1              repeat the round of seed 5
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.faults import FAULTS, clean, unavailable_reason
from tests.faults.harness import Harness

KINDS = ("lost", "differs", "rough")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first round; then one more each"
    )
    parser.add_argument("--only", choices=FAULTS, action="append", help="may be given repeatedly")
    args = parser.parse_args()

    possible = []
    for name in FAULTS if args.only is None else args.only:
        if reason := unavailable_reason(FAULTS[name]):
            print(f"skipped: {name}, {reason}")
        else:
            possible.append(name)
    if not possible:
        return 0

    rounds: Counter[str] = Counter()
    violations: Counter[tuple[str, str]] = Counter()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gptforge-faults-") as folder:
        harness = Harness(Path(folder))
        for seed in range(args.seed, args.seed + args.rounds):
            # The seed alone selects the fault, so that a round can be repeated.
            name = possible[seed % len(possible)]
            since = time.perf_counter()
            case = FAULTS[name](harness, random.Random(seed))
            clean(case)
            rounds[name] += 1
            violations.update({(name, kind) for kind in {c.kind for c in case.violations}})
            problems = "; ".join(f"{c.kind}: {c.what}" for c in case.violations)
            seconds = time.perf_counter() - since
            print(f"seed {seed:4d}  {name:20s} {seconds:5.1f} s  {problems or 'ok'}", flush=True)

    print(f"\n{'fault':20s} rounds" + "".join(f"{kind:>9s}" for kind in KINDS))
    for name in possible:
        counts = "".join(f"{violations[name, kind]:9d}" for kind in KINDS)
        print(f"{name:20s} {rounds[name]:6d}{counts}")
    seconds = time.perf_counter() - begin
    print(f"{sum(rounds.values())} rounds in {seconds:.0f} s")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
