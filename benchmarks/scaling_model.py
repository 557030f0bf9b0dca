"""Expected scaling with the number of GPUs, from bytes and bandwidth; nothing is measured.

    python benchmarks/scaling_model.py                               the tables of docs/scaling.md
    python benchmarks/scaling_model.py --step_ms 225 --host_gb 180   with your measurements

Gradients are all-reduced within a host first, then between hosts by all its GPUs at once, as NCCL
does; a ring sends each byte 2 (n - 1) / n times. Every hop costs some microseconds.
"""

import argparse
import math

from gptforge.config import Config
from gptforge.estimate import formulas
from gptforge.presets import get_preset

PEAK = 989e12
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
GB = 1e9
EMBEDDING_SHARE = 50304 * 768 / 124_475_904  # of the parameters of GPT-2 small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step_ms", type=float, default=223.2, help="131,072 tokens, one GPU")
    parser.add_argument("--host_gb", type=float, default=300.0, help="GB/s a GPU, within a host")
    parser.add_argument("--net_gb", type=float, default=50.0, help="GB/s a GPU, between hosts")
    parser.add_argument("--in_host", type=int, default=8, help="GPUs of a host")
    parser.add_argument("--hop_us", type=float, default=10.0, help="latency between hosts")
    parser.add_argument("--global_tokens", type=int, default=2**19, help="of strong scaling")
    parser.add_argument("--mfu", type=float, default=0.46, help="of gpt2-xl, resharded")
    parser.add_argument("--gathered_mfu", type=float, default=0.524, help="gathered once")
    args = parser.parse_args()

    small = config_of("gpt2")
    size = 4 * formulas.num_params(small.model)
    megabytes = f"{size / 1e6:,.0f} MB of gradients"
    print(f"GPT-2 small: {megabytes}, {EMBEDDING_SHARE:.0%} of them computed last\n")
    print("| GPUs | all-reduce, ms | exposed, ms | weak scaling | tokens/step |")
    print("| --- | --- | --- | --- | --- |")
    for count in COUNTS:
        total = all_reduce_ms(size, count, args)
        exposed = exposed_ms(size, count, args.step_ms, args)
        share = args.step_ms / (args.step_ms + exposed)
        tokens = count * small.tokens_per_step
        print(f"| {count:,} | {total:.1f} | {exposed:.1f} | {share:.1%} | {tokens / 1e6:.2f} M |")

    print(f"\nStrong scaling, {args.global_tokens:,} tokens per step\n")
    print("| GPUs | compute, ms | exposed, ms | of linear | sequences per GPU |")
    print("| --- | --- | --- | --- | --- |")
    for count in COUNTS:
        sequences = args.global_tokens / small.context_length / count
        if sequences < 1:
            print(f"| {count:,} | | | | fewer than one |")
            continue
        compute = args.step_ms * sequences / small.global_batch_size
        exposed = exposed_ms(size, count, compute, args)
        share = compute / (compute + exposed)
        print(f"| {count:,} | {compute:.1f} | {exposed:.1f} | {share:.0%} | {sequences:g} |")

    big = config_of("gpt2-xl")
    weights = formulas.num_params(big.model)
    flops = formulas.flops_per_token(big.model, big.context_length)
    moved = (2 + 4) * weights
    print(f"\ngpt2-xl sharded, gathered once: {moved / GB:.1f} GB per step and GPU\n")
    print(
        "| sequences/GPU | compute, ms | within a host, ms | between hosts, ms | exposed at most |"
    )
    print("| --- | --- | --- | --- | --- |")
    for sequences in (16, 32, 64, 128, 512):
        compute = 1e3 * sequences * big.context_length * flops / (PEAK * args.gathered_mfu)
        host, net = (1e3 * moved / GB / rate for rate in (args.host_gb, args.net_gb))
        exposed = f"{host / (compute + host):.1%}, {net / (compute + net):.1%}"
        print(f"| {sequences} | {compute:,.0f} | {host:.0f} | {net:.0f} | {exposed} |")

    moved = (2 + 2 + 4) * weights
    print(f"\nResharded after each block: {moved / GB:.1f} GB per micro-batch and GPU\n")
    print("| micro-batch | compute, ms | within a host, ms | between hosts, ms | hidden |")
    print("| --- | --- | --- | --- | --- |")
    for sequences in (1, 2, 4, 8, 16, 32):
        compute = 1e3 * sequences * big.context_length * flops / (PEAK * args.mfu)
        host, net = (1e3 * moved / GB / rate for rate in (args.host_gb, args.net_gb))
        where = "everywhere" if net < compute else "within a host" if host < compute else "nowhere"
        print(f"| {sequences} | {compute:.0f} | {host:.0f} | {net:.0f} | {where} |")


def config_of(name: str) -> Config:
    return Config(**{**vars(get_preset(name)), "vocab_size": 50304})


def exposed_ms(size: float, count: int, compute: float, args: argparse.Namespace) -> float:
    """Milliseconds of an all-reduce that computation does not hide.

    The gradient of the token embedding is computed last and always exposed; the rest overlaps with
    the backward of the last micro-batch, half of its time.
    """
    if count == 1:
        return 0.0
    hidden = 0.5 * min(compute, args.step_ms / 4)
    return max(
        all_reduce_ms(EMBEDDING_SHARE * size, count, args),
        all_reduce_ms(size, count, args) - hidden,
    )


def all_reduce_ms(size: float, count: int, args: argparse.Namespace) -> float:
    """Milliseconds to all-reduce `size` bytes over `count` GPUs, within hosts, then between."""
    per_host = min(count, args.in_host)
    hosts = math.ceil(count / args.in_host)
    within = 2 * (per_host - 1) / per_host * size / (args.host_gb * GB)
    # Each GPU of a host sends its share of the sum.
    between = 2 * (hosts - 1) / hosts * size / per_host / (args.net_gb * GB)
    buckets = max(1.0, size / (25 * 2**20))
    # A tree of hosts, up and down, for each bucket.
    hops = 2 * math.ceil(math.log2(hosts)) * args.hop_us * 1e-6 * buckets
    return 1e3 * (within + between + hops)


if __name__ == "__main__":
    main()
