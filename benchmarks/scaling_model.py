"""What to expect as GPUs are added: time to compute against time to talk, from bytes and bandwidth.

    python benchmarks/scaling_model.py                               the tables of docs/scaling.md
    python benchmarks/scaling_model.py --step_ms 225 --host_gb 180   with what your machine gave

Nothing is measured. Gradients are summed within a host first, then between hosts by all its GPUs at
once, as NCCL does; a ring sends each byte 2 (n - 1) / n times. Every hop costs some microseconds.
"""

import argparse
import math

from gptforge.config import Config
from gptforge.estimate import formulas
from gptforge.presets import get_preset

PEAK = 989e12
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
GB = 1e9
TABLE = 50304 * 768 / 124_475_904
"""The token table's share of GPT-2 small."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step_ms", type=float, default=223.2, help="131,072 tokens, one GPU")
    parser.add_argument("--host_gb", type=float, default=300.0, help="GB/s a GPU, within a host")
    parser.add_argument("--net_gb", type=float, default=50.0, help="GB/s a GPU, between hosts")
    parser.add_argument("--in_host", type=int, default=8, help="GPUs of a host")
    parser.add_argument("--hop_us", type=float, default=10.0, help="of a message from host to host")
    parser.add_argument("--global_tokens", type=int, default=2**19, help="of the strong table")
    parser.add_argument("--mfu", type=float, default=0.46, help="of gpt2-xl, block by block")
    parser.add_argument("--whole_mfu", type=float, default=0.524, help="of it put together")
    args = parser.parse_args()

    small = sized("gpt2")
    size = 4 * formulas.num_params(small.model)
    print(f"GPT-2 small: {size / 1e6:,.0f} MB of gradients, {TABLE:.0%} of them made last\n")
    print("| GPUs | sum, ms | in sight, ms | weak scaling | tokens a step |")
    print("| --- | --- | --- | --- | --- |")
    for count in COUNTS:
        total, shown = summing(size, count, args), in_sight(size, count, args.step_ms, args)
        share = args.step_ms / (args.step_ms + shown)
        tokens = count * small.tokens_per_step
        print(f"| {count:,} | {total:.1f} | {shown:.1f} | {share:.1%} | {tokens / 1e6:.2f} M |")

    print(f"\nThe same, {args.global_tokens:,} tokens a step shared by all\n")
    print("| GPUs | compute, ms | in sight, ms | of linear | windows a GPU |")
    print("| --- | --- | --- | --- | --- |")
    for count in COUNTS:
        windows = args.global_tokens / small.context_length / count
        if windows < 1:
            print(f"| {count:,} | | | | fewer than one |")
            continue
        compute = args.step_ms * windows / small.global_batch_size
        shown = in_sight(size, count, compute, args)
        share = compute / (compute + shown)
        print(f"| {count:,} | {compute:.1f} | {shown:.1f} | {share:.0%} | {windows:g} |")

    big = sized("gpt2-xl")
    weights = formulas.num_params(big.model)
    flops = formulas.flops_per_token(big.model, big.context_length)
    moved = (2 + 4) * weights
    print(f"\ngpt2-xl in shards, put together: {moved / GB:.1f} GB an update and GPU\n")
    print(
        "| windows a GPU | compute, ms | within a host, ms | between hosts, ms | at most in sight |"
    )
    print("| --- | --- | --- | --- | --- |")
    for windows in (16, 32, 64, 128, 512):
        compute = 1e3 * windows * big.context_length * flops / (PEAK * args.whole_mfu)
        host, net = (1e3 * moved / GB / rate for rate in (args.host_gb, args.net_gb))
        shares = f"{host / (compute + host):.1%}, {net / (compute + net):.1%}"
        print(f"| {windows} | {compute:,.0f} | {host:.0f} | {net:.0f} | {shares} |")

    moved = (2 + 2 + 4) * weights
    print(f"\nBlock by block: {moved / GB:.1f} GB a micro-batch and GPU\n")
    print("| windows at a time | compute, ms | within a host, ms | between hosts, ms | hidden |")
    print("| --- | --- | --- | --- | --- |")
    for windows in (1, 2, 4, 8, 16, 32):
        compute = 1e3 * windows * big.context_length * flops / (PEAK * args.mfu)
        host, net = (1e3 * moved / GB / rate for rate in (args.host_gb, args.net_gb))
        where = "everywhere" if net < compute else "within a host" if host < compute else "nowhere"
        print(f"| {windows} | {compute:.0f} | {host:.0f} | {net:.0f} | {where} |")


def sized(name: str) -> Config:
    return Config(**{**vars(get_preset(name)), "vocab_size": 50304})


def in_sight(size: float, count: int, compute: float, args: argparse.Namespace) -> float:
    """Milliseconds of a sum that no computation hides.

    The token table's gradients are made last and always in sight; of the rest, what does not go
    into the way back of the last micro-batch, taken as half of its time.
    """
    if count == 1:
        return 0.0
    hiding = 0.5 * min(compute, args.step_ms / 4)
    return max(summing(TABLE * size, count, args), summing(size, count, args) - hiding)


def summing(size: float, count: int, args: argparse.Namespace) -> float:
    """Milliseconds to sum so many bytes over `count` GPUs, in hosts and then between them."""
    inside = min(count, args.in_host)
    hosts = math.ceil(count / args.in_host)
    here = 2 * (inside - 1) / inside * size / (args.host_gb * GB)
    # Each GPU of a host has a part of the sum to send on.
    there = 2 * (hosts - 1) / hosts * size / inside / (args.net_gb * GB)
    pieces = max(1.0, size / (25 * 2**20))
    # A tree of hosts, up and down, for each piece.
    hops = 2 * math.ceil(math.log2(hosts)) * args.hop_us * 1e-6 * pieces
    return 1e3 * (here + there + hops)


if __name__ == "__main__":
    main()
