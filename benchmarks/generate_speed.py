"""Tokens a second when writing, beside transformers' `generate` with its cache, in one process.

    python benchmarks/generate_speed.py                                    as this machine allows
    python benchmarks/generate_speed.py --device cuda --batches 1 256 --peer_batches 1 256
    python benchmarks/generate_speed.py --shape shakespeare-cpu --new_tokens 90

Both get the same random weights, prompts of 32 random ids and 128 tokens to write; both take turns;
medians. Ours writes in the type that a run is loaded in, transformers in float32, as it loads a
GPT-2, and in that type as well. The default settings draw, temperature 0.8 and top-k 200;
`--greedy` takes the likeliest.
"""

import argparse
import os
import statistics
import time

import torch

from gptforge.config import GPTConfig
from gptforge.generate.decode import Decoder
from gptforge.generate.engine import Engine
from gptforge.generate.sampling import Sampling
from gptforge.generate.speed import measure_writing
from gptforge.hardware import choose_device, choose_precision, synchronize
from gptforge.model import GPT
from gptforge.presets import PRESETS, preset

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gpt2", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--peer_batches", type=int, nargs="*", default=[1])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--greedy", action="store_true")
    args = parser.parse_args()

    device, name = choose_device(args.device)
    dtype = choose_precision(args.dtype, device).dtype
    config = preset(args.shape).model
    size = {"gpt2": 50257}.get(preset(args.shape).tokenizer, 99)
    shape = GPTConfig(**{**vars(config), "vocab_size": -(-size // 64) * 64})
    torch.manual_seed(0)
    model = GPT(shape).initialize().to(device).eval()
    sampling = Sampling(0) if args.greedy else Sampling()
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {args.shape}, {sampling}")
    print(f"\n{args.prompt} tokens of prompt, {args.new_tokens} new ones; median of {args.turns}\n")
    print("| who | type | batch | tokens/s | ms to the first token | CUDA graph |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    wanted = {"prompt": args.prompt, "new_tokens": args.new_tokens, "turns": args.turns}
    ours = {}
    for kind in dict.fromkeys((dtype, torch.float32)):
        decoder = Decoder(Engine(model, size=size, dtype=kind), captured=True)
        for batch in args.batches:
            speed = measure_writing(decoder, batch=batch, sampling=sampling, **wanted)
            ours[kind, batch] = speed.tokens_per_second
            print(
                f"| gptforge | {_name(kind)} | {batch} | {speed.tokens_per_second:,.0f} | "
                f"{speed.ms_to_first:.1f} | {'yes' if speed.is_captured else 'no'} |",
                flush=True,
            )
    for kind in dict.fromkeys((torch.float32, dtype)):
        for batch in args.peer_batches:
            rate = peer_rate(model, kind, batch, sampling, **wanted)
            print(f"| transformers | {_name(kind)} | {batch} | {rate:,.0f} | | no |", flush=True)
            if (dtype, batch) in ours:
                ratio = ours[dtype, batch] / rate
                print(f"|  | ours, {_name(dtype)}, is {ratio:.2f} times that | | | | |", flush=True)


def peer_rate(
    model: GPT,
    dtype: torch.dtype,
    batch: int,
    sampling: Sampling,
    *,
    prompt: int,
    new_tokens: int,
    turns: int,
) -> float:
    """Tokens a second of transformers' GPT2LMHeadModel.generate on the same weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    c = model.config
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    weights = {
        name: tensor.t() if name.endswith(TRANSPOSED) else tensor
        for name, tensor in model.state_dict().items()
    }
    peer.load_state_dict(weights)
    device = next(model.parameters()).device
    peer = peer.to(device, dtype).eval()
    ids = torch.randint(0, 99, (batch, prompt), device=device)
    how = {"do_sample": False}
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    seconds = []
    for turn in range(turns + 1):
        synchronize(device)
        begin = time.perf_counter()
        peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            use_cache=True,
            pad_token_id=0,
            **how,
        )
        synchronize(device)
        if turn:
            seconds.append(time.perf_counter() - begin)
    return batch * new_tokens / statistics.median(seconds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
