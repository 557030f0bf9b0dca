"""Fault injection: interrupted and corrupted runs must end as if nothing had happened.

python -m pytest tests/faults -n 0         each fault once or a few times
python -m tests.faults --rounds 200        random faults, for longer
"""
