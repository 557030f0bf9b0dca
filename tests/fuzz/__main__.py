"""Mutated files, for as long as you like.

python -m tests.fuzz --rounds 20000                 every format
python -m tests.fuzz --rounds 20000 --only parquet  one of them
python -m tests.fuzz --only state --seed 77 --rounds 1   the round that was called "state 77"
"""

import argparse
import time
from collections import Counter

from tests.fuzz.formats import FORMATS, furnished
from tests.fuzz.harness import Found, Trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=2000, help="mutations of each format")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first round; then one more each"
    )
    parser.add_argument("--only", choices=FORMATS, action="append", help="may be given repeatedly")
    asked = parser.parse_args()
    total: Counter[str] = Counter()
    for name in asked.only or FORMATS:
        begin, counts, told = time.perf_counter(), Counter(), set()
        with furnished() as folder:
            trial = Trial(name, folder)
            for seed in range(asked.seed, asked.seed + asked.rounds):
                try:
                    is_refused = trial.attempt(seed)
                    counts["refused" if is_refused else "worked"] += 1
                except Found as found:
                    counts["found"] += 1
                    lines = str(found).splitlines()
                    if (where := lines[-2:][0]) not in told and len(told) < 5:
                        told.add(where)
                        print(found, flush=True)
        seconds = time.perf_counter() - begin
        words = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        print(f"{name:<12}{words}; {1e3 * seconds / asked.rounds:.2f} ms each", flush=True)
        total.update(counts)
    print(f"in all: {dict(total)}")
    return 1 if total["found"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
