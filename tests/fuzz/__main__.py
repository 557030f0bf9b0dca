"""Fuzz the readers of all file formats.

python -m tests.fuzz --rounds 20000                 every format
python -m tests.fuzz --rounds 20000 --only parquet  one of them
python -m tests.fuzz --only state --seed 77 --rounds 1   repeat the failure "state 77"
"""

import argparse
import time
from collections import Counter

from tests.fuzz.formats import FORMATS, make_folder
from tests.fuzz.harness import FuzzFailure, Trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=2000, help="mutations of each format")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first round; then one more each"
    )
    parser.add_argument("--only", choices=FORMATS, action="append", help="may be given repeatedly")
    args = parser.parse_args()
    total: Counter[str] = Counter()
    for name in args.only or FORMATS:
        start, counts, reported = time.perf_counter(), Counter(), set()
        with make_folder() as folder:
            trial = Trial(name, folder)
            for seed in range(args.seed, args.seed + args.rounds):
                try:
                    is_refused = trial.attempt(seed)
                    counts["refused" if is_refused else "worked"] += 1
                except FuzzFailure as failure:
                    counts["failed"] += 1
                    lines = str(failure).splitlines()
                    if (summary := lines[-2:][0]) not in reported and len(reported) < 5:
                        reported.add(summary)
                        print(failure, flush=True)
        seconds = time.perf_counter() - start
        summary = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        print(f"{name:<12}{summary}; {1e3 * seconds / args.rounds:.2f} ms each", flush=True)
        total.update(counts)
    print(f"total: {dict(total)}")
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
