"""Every format that is read: a good file, how it is mutated, and all that reads it."""

import contextlib
import gzip
import io
import json
import lzma
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard

from gptforge import files, tokenizers
from gptforge.builders.evaluate import _load_examples
from gptforge.builders.load_model import load_bundle
from gptforge.checkpoint import store
from gptforge.checkpoint.state_dict import load_rng_state_dict, save_safetensors
from gptforge.cli.prepare import describe
from gptforge.config import (
    Config,
    GPTConfig,
    merge,
    read_toml,
    to_toml,
    validate,
)
from gptforge.convert.bundle import ModelBundle
from gptforge.convert.hf import FIXED_CONFIG, read_hf
from gptforge.convert.hf_tokenizer import load_hf_tokenizer, tokenizer_json
from gptforge.convert.model_card import Origin, model_card
from gptforge.convert.nanogpt import read_nanogpt
from gptforge.data.dataset import DatasetOptions, check_length, open_dataset
from gptforge.data.index import VERIFIED_FILE, find_corruption, read_index
from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.scan import iter_text
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.text_io import TextFormat
from gptforge.demo.training_tab import render_training
from gptforge.doctor.shards import check_shards
from gptforge.errors import UserError
from gptforge.model import GPT
from gptforge.report.metrics import read_history
from gptforge.report.verdict import verdict
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer
from gptforge.tokenizers.gpt2 import GPT2Tokenizer
from gptforge.train.micro_batch import find_micro_batch
from gptforge.train.state import TrainState, read_train_state
from tests.fuzz import mutate

SHAPE = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=8)
TEXT = "To be, or not to be, that is the question:\n"
ALPHABET = "".join(sorted(set(TEXT)))
MERGES = ["Ġ t", "h e", "Ġt o", "b e", "o n"]
STATE = {
    "version": 1,
    **TrainState(
        step=2, best_step=2, best_loss=1.4, recent_losses=[2.0], pending=["save"]
    ).to_json(),
    "loader": {"position": 16},
    "scaler": {},
    "file_sizes": {"log.md": 10, "metrics.jsonl": 20, "samples.md": 0},
    "text_sha256": "0" * 64,
}


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    path: str
    """Where the mutated file lies in the scratch folder."""
    good: Callable[[], bytes] | None
    """None: what `furnish` put there."""
    mutate: mutate.Mutate
    read: Callable[[Path], Any]
    """All that reads it, given the scratch folder."""


@contextlib.contextmanager
def furnished() -> Iterator[Path]:
    """A scratch folder with what lies around the mutated file, in memory where that can be."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        furnish(Path(scratch))
        yield Path(scratch)


def furnish(folder: Path) -> None:
    """What lies around the mutated file: a checkpoint, a model of transformers', shards."""
    model = GPT(SHAPE).init_weights(torch.Generator().manual_seed(0))
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    checkpoint, hf = folder / "run/checkpoints/step-000002", folder / "hf"
    for place in (checkpoint, hf, folder / "in"):
        place.mkdir(parents=True)
    config = config_text()
    store.save_inference_checkpoint(
        checkpoint, tensors, tokenizer=CharTokenizer(ALPHABET), config=config
    )
    save_safetensors(checkpoint / store.RNG_STATE, {"cpu": torch.get_rng_state()})
    (checkpoint / store.STATE).write_text(json.dumps(STATE))
    (folder / "run/config.toml").write_text(config)
    (folder / "run/metrics.jsonl").write_bytes(metrics())
    save_safetensors(hf / "model.safetensors", turned(tensors))
    (hf / "config.json").write_bytes(hf_config())
    (hf / "tokenizer.json").write_bytes(json.dumps(tokenizer_json(ByteTokenizer())).encode())
    tokenizers.save(CharTokenizer(ALPHABET), hf / "gptforge_tokenizer.json")
    (folder / "in/text.txt").write_text(TEXT * 30)
    request = PrepareRequest((str(folder / "in/text.txt"),), tokenizer="byte", val_fraction=0.1)
    prepare(folder / "shards", request, num_workers=1)
    (folder / "in/text.txt").unlink()
    (folder / "foreign").mkdir()


def turned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers stores them."""
    from gptforge.convert.hf import TRANSPOSED

    return {n: t.t().contiguous() if n.endswith(TRANSPOSED) else t for n, t in tensors.items()}


def config_text() -> str:
    shape = {**vars(SHAPE), "context_length": 8, "tokenizer": "char", "warmup_steps": 1}
    config = merge(Config(), {**shape, "max_steps": 2, "batch_size": 2}, source="fuzz")
    return to_toml(config, {"gptforge": "0", "command": "train"})


def hf_config() -> bytes:
    sizes = {"n_positions": 8, "n_ctx": 8, "vocab_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 8}
    return json.dumps(
        {**{n: v[0] for n, v in FIXED_CONFIG.items()}, **sizes, "n_inner": 32}
    ).encode()


def metrics() -> bytes:
    train = {
        "event": "train",
        "loss": 2.5,
        "dt_ms": 9.1,
        "tok_per_sec": 1e4,
        "norm": 1.0,
        "lr": 0.1,
    }
    lines = [{**train, "step": i, "epoch": i / 4} for i in range(4)]
    lines += [
        {"event": "eval", "step": i, "val_loss": 2.0, "val_bpb": 1.5, "epoch": 1.0} for i in (2, 4)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def ckpt() -> dict[str, Any]:
    model = GPT(SHAPE).init_weights(torch.Generator().manual_seed(0))
    sizes = {**vars(SHAPE), "bias": True}
    return {
        "model": dict(model.state_dict()),
        "model_args": sizes,
        "iter_num": 3,
        "config": {"a": "b"},
    }


ODD_TENSORS = (
    *(torch.zeros(3), torch.zeros(0), torch.zeros(8, 8), torch.tensor(1), torch.zeros(64, 8).int()),
    *(
        torch.zeros(64, 8, dtype=torch.complex64),
        torch.zeros(8, dtype=torch.bool),
        torch.ones(8).half(),
    ),
    *(
        torch.zeros(64, 8).to_sparse(),
        torch.full((8,), float("nan")),
        torch.zeros(8, device="meta"),
    ),
)


def ckpt_file(data: bytes, dice: random.Random) -> bytes:
    """nanoGPT's record with odd values or tensors in it, or bytes."""
    if dice.random() < 0.3:
        return mutate.raw(data, dice)
    record = ckpt()
    if dice.random() < 0.4:
        record["model"][dice.choice(list(record["model"]))] = dice.choice(ODD_TENSORS)
    else:
        record = mutate.tree(record, dice)
    made = io.BytesIO()
    try:
        torch.save(record, made)  # noqa: TID251
    except (ValueError, RecursionError):
        return b""
    return made.getvalue()


def parquet() -> bytes:
    made = io.BytesIO()
    table = pa.table({"text": [TEXT, TEXT * 2, "", "x"] * 3, "n": list(range(12))})
    pq.write_table(table, made, row_group_size=4)
    return made.getvalue()


def used(tokenizer: tokenizers.Tokenizer) -> None:
    """What a tokenizer is asked for."""
    ids = [int(i) for i in tokenizer.encode("to be")]
    tokenizers.decode(tokenizer, ids)
    tokenizers.byte_lengths(tokenizer)
    json.dumps(tokenizer.to_json())


def read_tokenizer(folder: Path) -> None:
    used(tokenizers.load(folder / "tokenizer.json"))


def read_checkpoint(folder: Path) -> None:
    """A checkpoint whose manifest agrees with what was mutated."""
    path = folder / "run/checkpoints/step-000002"
    manifest = {
        name: {"bytes": (path / name).stat().st_size, "sha256": files.sha256(path / name)}
        for name in store.INFERENCE_FILES
    }
    (path / store.MANIFEST).write_text(json.dumps({"files": manifest}))
    load_bundle(path)


def read_state(folder: Path) -> None:
    path = folder / "run/checkpoints/step-000002"
    read_train_state(path, store.read_state(path))
    store.CheckpointStore(path.parent).repair_links(path)


def read_generators(folder: Path) -> None:
    tensors = store.read_tensors(folder / "run/checkpoints/step-000002", store.RNG_STATE)
    with torch.random.fork_rng([]):
        load_rng_state_dict(tensors, torch.device("cpu"))


def read_manifest(folder: Path) -> None:
    path = folder / "run/checkpoints/step-000002"
    store.find_corruption(path)
    load_bundle(path)


def read_flags_file(folder: Path) -> None:
    values, _ = read_toml(folder / "c.toml")
    validate(merge(Config(), values, source="--config c.toml"))


def read_shards(folder: Path) -> None:
    """Index and shards as training, `prepare` and `doctor` read them."""
    index = read_index(folder / "shards")
    if index is not None:
        describe(index)
        check_shards(folder / "shards", DatasetOptions(tokenizer="byte"), context_length=8)
        find_corruption(index)
        # Its hash in the stamp would refuse every index that is another.
        wanted = DatasetOptions(tokenizer="byte", verify=False)
        check_length(open_dataset(folder / "shards", wanted, log=lambda _: None), 8)


def read_verified(folder: Path) -> None:
    check_length(
        open_dataset(folder / "shards", DatasetOptions(tokenizer="byte"), log=lambda _: None), 8
    )


def read_foreign(folder: Path) -> None:
    for headerless in (True, False):
        wanted = DatasetOptions(tokenizer="byte", raw_bin=headerless, require_tokenizer=True)
        try:
            corpus = open_dataset(folder / "foreign", wanted, log=lambda _: None)
            corpus.train[:]
            corpus.val[:]
        except UserError:
            if not headerless:
                raise


def read_metrics(folder: Path) -> None:
    history = read_history(folder / "run/metrics.jsonl")
    verdict(history, total_steps=4, epochs=1.0, out_dir="run", has_val=True)
    verdict(history, total_steps=4, epochs=1.0, out_dir="run", has_val=False)
    render_training(folder / "run", max_steps=4)
    origin = Origin(merge(Config(), {}, source="fuzz"), 4, history, None)
    model_card(
        ModelBundle(SHAPE, {}, ByteTokenizer()), origin, title="m", usage="u", front_matter={}
    )


def read_texts(folder: Path, name: str, form: TextFormat | None = None) -> None:
    [source] = find_sources([str(folder / "in" / name)])
    for is_allowed in (True, False):
        skipped = BadInputHandler(is_allowed)
        try:
            for _ in islice(iter_text(source, form or TextFormat(), skipped), 1000):
                pass
        except BadInput as bad:
            skipped.handle(bad)


def read_answers(folder: Path) -> None:
    path = folder / "micro.json"
    fits = {"estimate": lambda count: count, "fits": lambda count: True, "free": None}
    assert 1 <= find_micro_batch(8, **fits, cache_path=path, key="k") <= 8


def merges_file() -> bytes:
    return ("#version: 0.2\n" + "\n".join(MERGES) + "\n").encode()


def of(tokenizer: tokenizers.Tokenizer) -> bytes:
    return json.dumps(
        {"format": "gptforge-tokenizer", "version": 1, **tokenizer.to_json()}
    ).encode()


def hellaswag() -> bytes:
    row = {
        "ctx_a": "A man",
        "ctx_b": "he sits",
        "activity_label": "Rest",
        "endings": ["a", "b"],
        "label": "1",
    }
    return (json.dumps(row) + "\n").encode() * 2


def shard_file() -> bytes:
    header = b"".join(n.to_bytes(4, "little") for n in (20240520, 1, 40)) + bytes(1012)
    return header + b"A\0" * 40


LINES = (json.dumps({"text": TEXT, "meta": {"n": 1}}) + "\n").encode() * 4
CHATS = (
    json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]})
    + "\n"
    + json.dumps(
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}]}
    )
    + "\n"
).encode()
TABLE = b'id,text\n1,"some words, quoted"\n2,more words\n3,"a ""quote"" and\na line"\n' * 2
STEP = "run/checkpoints/step-000002"
FORMATS: dict[str, Format] = {
    "hf_config": Format("hf/config.json", None, mutate.json_file, lambda f: read_hf(f / "hf")),
    "hf_weights": Format(
        "hf/model.safetensors", None, mutate.safetensors_file, lambda f: read_hf(f / "hf")
    ),
    "hf_bpe": Format(
        "tokenizer.json",
        lambda: json.dumps(tokenizer_json(GPT2Tokenizer(MERGES))).encode(),
        mutate.json_file,
        read_tokenizer,
    ),
    "bpe": Format(
        "tokenizer.json", lambda: of(GPT2Tokenizer(MERGES)), mutate.json_file, read_tokenizer
    ),
    "char": Format(
        "tokenizer.json",
        lambda: of(CharTokenizer(ALPHABET, with_eot=True)),
        mutate.json_file,
        read_tokenizer,
    ),
    "byte": Format(
        "tokenizer.json",
        lambda: of(ByteTokenizer(with_eot=True)),
        mutate.json_file,
        read_tokenizer,
    ),
    "merges": Format(
        "bpe/merges.txt", merges_file, mutate.raw, lambda f: used(load_hf_tokenizer(f / "bpe"))
    ),
    "state": Format(f"{STEP}/state.json", None, mutate.json_file, read_state),
    "manifest": Format(f"{STEP}/manifest.json", None, mutate.json_file, read_manifest),
    "run_config": Format(f"{STEP}/config.toml", None, mutate.toml_file, read_checkpoint),
    "run_weights": Format(
        f"{STEP}/model.safetensors", None, mutate.safetensors_file, read_checkpoint
    ),
    "rng": Format(f"{STEP}/rng.safetensors", None, mutate.safetensors_file, read_generators),
    "flags_file": Format(
        "c.toml", lambda: config_text().encode(), mutate.toml_file, read_flags_file
    ),
    "index": Format("shards/index.json", None, mutate.json_file, read_shards),
    "stamp": Format(f"shards/{VERIFIED_FILE}", None, mutate.json_file, read_verified),
    "shard": Format("foreign/a_val.bin", shard_file, mutate.numbers, read_foreign),
    "metrics": Format("run/metrics.jsonl", None, mutate.json_lines, read_metrics),
    "nanogpt": Format(
        "ckpt.pt",
        lambda: b"PK",
        ckpt_file,
        lambda f: read_nanogpt(
            f / "ckpt.pt", tokenizer=CharTokenizer("".join(map(chr, range(64))))
        ),
    ),
    "text": Format(
        "in/t.txt", lambda: TEXT.encode() * 3, mutate.raw, lambda f: read_texts(f, "t.txt")
    ),
    "marked": Format(
        "in/t.txt",
        lambda: TEXT.encode() * 3,
        mutate.raw,
        lambda f: read_texts(f, "t.txt", TextFormat(split_on="\n")),
    ),
    "utf16": Format(
        "in/t.txt",
        lambda: TEXT.encode("utf-16"),
        mutate.raw,
        lambda f: read_texts(f, "t.txt", TextFormat(encoding="utf-16")),
    ),
    "jsonl": Format(
        "in/t.jsonl", lambda: LINES, mutate.json_lines, lambda f: read_texts(f, "t.jsonl")
    ),
    "chats": Format(
        "in/t.jsonl", lambda: CHATS, mutate.json_lines, lambda f: read_texts(f, "t.jsonl")
    ),
    "json_array": Format(
        "in/t.json",
        lambda: b"[" + b",".join(LINES.splitlines() + CHATS.splitlines()) + b"]",
        mutate.json_file,
        lambda f: read_texts(f, "t.json"),
    ),
    "json_array_raw": Format(
        "in/t.json",
        lambda: b"[" + b",".join(LINES.splitlines()) + b"]",
        mutate.raw,
        lambda f: read_texts(f, "t.json"),
    ),
    "csv": Format("in/t.csv", lambda: TABLE, mutate.raw, lambda f: read_texts(f, "t.csv")),
    "csv_replaced": Format(
        "in/t.tsv",
        lambda: TABLE.replace(b",", b"\t"),
        mutate.raw,
        lambda f: read_texts(f, "t.tsv", TextFormat(encoding="utf-8:replace")),
    ),
    "gz": Format(
        "in/t.txt.gz",
        lambda: gzip.compress(TEXT.encode() * 9),
        mutate.raw,
        lambda f: read_texts(f, "t.txt.gz"),
    ),
    "xz": Format(
        "in/t.txt.xz",
        lambda: lzma.compress(TEXT.encode() * 9),
        mutate.raw,
        lambda f: read_texts(f, "t.txt.xz"),
    ),
    "zst": Format(
        "in/t.txt.zst",
        lambda: zstandard.compress(TEXT.encode() * 9),
        mutate.raw,
        lambda f: read_texts(f, "t.txt.zst"),
    ),
    "parquet": Format("in/t.parquet", parquet, mutate.raw, lambda f: read_texts(f, "t.parquet")),
    "hellaswag": Format(
        "q.jsonl",
        hellaswag,
        mutate.json_lines,
        lambda f: _load_examples("hellaswag", str(f / "q.jsonl"), 0),
    ),
    "lambada": Format(
        "q.jsonl",
        lambda: LINES,
        mutate.json_lines,
        lambda f: _load_examples("lambada", str(f / "q.jsonl"), 0),
    ),
    "answers": Format(
        "micro.json", lambda: b'{"0123456789abcdef": 4}', mutate.json_file, read_answers
    ),
}
