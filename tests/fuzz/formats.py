"""Every file format that is read: a valid file, how to mutate it, and its readers."""

import contextlib
import functools
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
from gptforge.builders.load_model import load_saved
from gptforge.builders.run_evaluation import _load_examples
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.state_dict import load_rng_state_dict, save_safetensors
from gptforge.checkpoint.store import CheckpointStore
from gptforge.cli.prepare import describe
from gptforge.config import Config, GPTConfig, merge
from gptforge.config_checks import validate
from gptforge.config_file import read_toml, to_toml
from gptforge.convert.bundle import ModelBundle
from gptforge.convert.hf import FIXED_CONFIG, read_hf
from gptforge.convert.hf_tokenizer import load_hf_tokenizer, tokenizer_json
from gptforge.convert.model_card import Origin, model_card
from gptforge.convert.nanogpt import read_nanogpt
from gptforge.data.dataset import DatasetOptions, check_length, open_dataset
from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.scan import iter_text
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.shard_index import VERIFIED_FILE, find_corruption, read_index
from gptforge.demo.run_data import run_metrics
from gptforge.doctor.shards import check_shards
from gptforge.errors import UserError, parsing
from gptforge.model import GPT
from gptforge.report.metrics import read_history
from gptforge.report.run_info import read_run
from gptforge.report.verdict import verdict
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer
from gptforge.tokenizers.gpt2 import GPT2Tokenizer
from gptforge.training.state import TrainState
from tests.fuzz import mutate

SHAPE = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=8)
TEXT = "To be, or not to be, that is the question:\n"
ALPHABET = "".join(sorted(set(TEXT)))
MERGES = ["Ġ t", "h e", "Ġt o", "b e", "o n"]
STATE = {
    "version": 1,
    **TrainState(step=2, best_step=2, best_loss=1.4, recent_losses=[2.0]).to_json(),
    "pending": ["evaluate", "save"],  # as a run of an earlier version that was interrupted
    "loader": {"position": 16},
    "scaler": {},
    "file_sizes": {"log.md": 10, "metrics.jsonl": 20, "samples.md": 0},
    "text_sha256": "0" * 64,
}


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        path: of the mutated file in the scratch folder.
        make: gives a valid file; None: `fill_folder` wrote one.
        read: calls all readers, given the scratch folder.
    """

    path: str
    make: Callable[[], bytes] | None
    mutate: mutate.Mutate
    read: Callable[[Path], Any]


@contextlib.contextmanager
def make_folder() -> Iterator[Path]:
    """A scratch folder with all other files that the readers need, in memory if possible."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        fill_folder(Path(scratch))
        yield Path(scratch)


def fill_folder(folder: Path) -> None:
    """Write a checkpoint, a Hugging Face model and shards."""
    model = GPT(SHAPE).init_weights(torch.Generator().manual_seed(0))
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    checkpoint, hf = folder / "run/checkpoints/step-000002", folder / "hf"
    for place in (checkpoint, hf, folder / "in"):
        place.mkdir(parents=True)
    config = config_text()
    checkpoints.save_checkpoint(
        checkpoint, {checkpoints.MODEL: tensors}, tokenizer=CharTokenizer(ALPHABET), config=config
    )
    rng_state = torch.Generator().manual_seed(0).get_state()
    save_safetensors(checkpoint / checkpoints.RNG_STATE, {"cpu": rng_state})
    (checkpoint / checkpoints.STATE).write_text(json.dumps(STATE))
    (folder / "run/config.toml").write_text(config)
    (folder / "run/metrics.jsonl").write_bytes(metrics())
    save_safetensors(hf / "model.safetensors", transpose_linear(tensors))
    (hf / "config.json").write_bytes(hf_config())
    (hf / "tokenizer.json").write_bytes(json.dumps(tokenizer_json(ByteTokenizer())).encode())
    tokenizers.save(CharTokenizer(ALPHABET), hf / "gptforge_tokenizer.json")
    (folder / "in/text.txt").write_text(TEXT * 30)
    request = PrepareRequest((str(folder / "in/text.txt"),), tokenizer="byte", val_fraction=0.1)
    prepare(folder / "shards", request, num_workers=1)
    (folder / "in/text.txt").unlink()
    (folder / "foreign").mkdir()


def transpose_linear(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Linear weights as transformers stores them."""
    from gptforge.convert.hf import TRANSPOSED

    return {n: t.t().contiguous() if n.endswith(TRANSPOSED) else t for n, t in tensors.items()}


def config_text() -> str:
    shape = {**vars(SHAPE), "context_length": 8, "tokenizer": "char", "warmup_steps": 1}
    config = merge(Config(), {**shape, "max_steps": 2, "batch_size": 2}, source="fuzz")
    return to_toml(config, {"gptforge": "0", "command": "train"})


def hf_config() -> bytes:
    sizes = {"n_positions": 8, "n_ctx": 8, "vocab_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 8}
    return json.dumps({**FIXED_CONFIG, **sizes, "n_inner": 32}).encode()


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


@functools.cache
def make_nanogpt_checkpoint() -> dict[str, Any]:
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


def mutate_nanogpt_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """Put odd values or tensors into nanoGPT's checkpoint, or mutate bytes."""
    if rng.random() < 0.3:
        return mutate.raw(data, rng)
    record = make_nanogpt_checkpoint()
    record = {**record, "model": dict(record["model"])}
    if rng.random() < 0.4:
        record["model"][rng.choice(list(record["model"]))] = rng.choice(ODD_TENSORS)
    else:
        record = mutate.tree(record, rng)
    file = io.BytesIO()
    try:
        torch.save(record, file)  # noqa: TID251
    except (ValueError, RecursionError):
        return b""
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    table = pa.table({"text": [TEXT, TEXT * 2, "", "x"] * 3, "n": list(range(12))})
    pq.write_table(table, file, row_group_size=4)
    return file.getvalue()


def use_tokenizer(tokenizer: tokenizers.Tokenizer) -> None:
    """Call all methods of a tokenizer."""
    ids = [int(i) for i in tokenizer.encode("to be")]
    tokenizers.base.decode(tokenizer, ids)
    tokenizers.base.byte_lengths(tokenizer)
    json.dumps(tokenizer.to_json())


def read_tokenizer(folder: Path) -> None:
    use_tokenizer(tokenizers.load(folder / "tokenizer.json"))


def read_checkpoint(folder: Path) -> None:
    """Read a checkpoint whose manifest has the hash of the mutated file."""
    path = folder / "run/checkpoints/step-000002"
    manifest = {
        name: {"bytes": (path / name).stat().st_size, "sha256": files.sha256(path / name)}
        for name in checkpoints.INFERENCE_FILES
    }
    (path / checkpoints.MANIFEST).write_text(json.dumps({"files": manifest}))
    load_saved(path)


def read_state(folder: Path) -> None:
    path = folder / "run/checkpoints/step-000002"
    with parsing(path / checkpoints.STATE, "a state that a run saved"):
        TrainState.from_json(checkpoints.read_state(path))
    CheckpointStore(path.parent).repair_links(path)


def read_rng_state(folder: Path) -> None:
    tensors = checkpoints.read_tensors(
        folder / "run/checkpoints/step-000002", checkpoints.RNG_STATE
    )
    with torch.random.fork_rng([]):
        load_rng_state_dict(tensors, torch.device("cpu"))


def read_manifest(folder: Path) -> None:
    path = folder / "run/checkpoints/step-000002"
    checkpoints.find_corruption(path)
    load_saved(path)


def read_flags_file(folder: Path) -> None:
    values, _ = read_toml(folder / "c.toml")
    validate(merge(Config(), values, source="--config c.toml"))


def read_shards(folder: Path) -> None:
    """Read index and shards like training, `prepare` and `doctor`."""
    index = read_index(folder / "shards")
    if index is not None:
        describe(index)
        check_shards(folder / "shards", DatasetOptions(tokenizer="byte"), context_length=8)
        find_corruption(index)
        # With `verify`, the hash of the index would refuse every mutation.
        options = DatasetOptions(tokenizer="byte", verify=False)
        check_length(open_dataset(folder / "shards", options), 8)


def read_verified(folder: Path) -> None:
    check_length(open_dataset(folder / "shards", DatasetOptions(tokenizer="byte")), 8)


def read_shards_of_others(folder: Path) -> None:
    for raw_bin in (True, False):
        options = DatasetOptions(tokenizer="byte", raw_bin=raw_bin, require_tokenizer=True)
        try:
            dataset = open_dataset(folder / "foreign", options)
            dataset.train[:]
            dataset.val[:]
        except UserError:
            if not raw_bin:
                raise


def read_metrics(folder: Path) -> None:
    history = read_history(folder / "run/metrics.jsonl")
    verdict(history, max_steps=4, out_dir="run", has_val=True)
    verdict(history, max_steps=4, out_dir="run", has_val=False)
    json.dumps(run_metrics(history, [("best", "step-000004")], max_steps=4), allow_nan=False)
    with contextlib.suppress(UserError):
        read_run(folder / "run").to_json()
    origin = Origin(merge(Config(), {}, source="fuzz"), 4, history, None)
    model_card(ModelBundle(SHAPE, {}, ByteTokenizer()), origin, title="m")


def read_texts(folder: Path, name: str, options: TextFormat | None) -> None:
    [source] = find_sources([str(folder / "in" / name)])
    for skip in (True, False):
        bad_input = BadInputHandler(skip)
        try:
            for _ in islice(iter_text(source, options or TextFormat(), bad_input), 1000):
                pass
        except BadInput as bad:
            bad_input.handle(bad)


def merges_file() -> bytes:
    return ("#version: 0.2\n" + "\n".join(MERGES) + "\n").encode()


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


def text_format(
    name: str,
    data: bytes | Callable[[], bytes],
    mutation: mutate.Mutate = mutate.raw,
    options: TextFormat | None = None,
) -> Format:
    make = data if callable(data) else lambda: data
    return Format(f"in/{name}", make, mutation, lambda folder: read_texts(folder, name, options))


def tokenizer_format(tokenizer: tokenizers.Tokenizer) -> Format:
    record = {"format": "gptforge-tokenizer", "version": 1, **tokenizer.to_json()}
    return Format(
        "tokenizer.json", lambda: json.dumps(record).encode(), mutate.json_file, read_tokenizer
    )


def task_format(task: str, data: bytes) -> Format:
    return Format(
        "q.jsonl",
        lambda: data,
        mutate.json_lines,
        lambda folder: _load_examples(task, str(folder / "q.jsonl"), 0),
    )


BYTES = TEXT.encode()
FORMATS: dict[str, Format] = {
    "hf_config": Format(
        "hf/config.json", None, mutate.json_file, lambda folder: read_hf(folder / "hf")
    ),
    "hf_weights": Format(
        "hf/model.safetensors", None, mutate.safetensors_file, lambda folder: read_hf(folder / "hf")
    ),
    "hf_bpe": Format(
        "tokenizer.json",
        lambda: json.dumps(tokenizer_json(GPT2Tokenizer(MERGES))).encode(),
        mutate.json_file,
        read_tokenizer,
    ),
    "bpe": tokenizer_format(GPT2Tokenizer(MERGES)),
    "char": tokenizer_format(CharTokenizer(ALPHABET, with_eot=True)),
    "byte": tokenizer_format(ByteTokenizer(with_eot=True)),
    "merges": Format(
        "bpe/merges.txt",
        merges_file,
        mutate.raw,
        lambda folder: use_tokenizer(load_hf_tokenizer(folder / "bpe")),
    ),
    "state": Format(f"{STEP}/state.json", None, mutate.json_file, read_state),
    "manifest": Format(f"{STEP}/manifest.json", None, mutate.json_file, read_manifest),
    "run_config": Format(f"{STEP}/config.toml", None, mutate.toml_file, read_checkpoint),
    "run_weights": Format(
        f"{STEP}/model.safetensors", None, mutate.safetensors_file, read_checkpoint
    ),
    "rng": Format(f"{STEP}/rng.safetensors", None, mutate.safetensors_file, read_rng_state),
    "flags_file": Format(
        "c.toml", lambda: config_text().encode(), mutate.toml_file, read_flags_file
    ),
    "index": Format("shards/index.json", None, mutate.json_file, read_shards),
    "stamp": Format(f"shards/{VERIFIED_FILE}", None, mutate.json_file, read_verified),
    "shard": Format("foreign/a_val.bin", shard_file, mutate.numbers, read_shards_of_others),
    "metrics": Format("run/metrics.jsonl", None, mutate.json_lines, read_metrics),
    "nanogpt": Format(
        "ckpt.pt",
        lambda: b"PK",
        mutate_nanogpt_checkpoint,
        lambda folder: read_nanogpt(
            folder / "ckpt.pt", tokenizer=CharTokenizer("".join(map(chr, range(64))))
        ),
    ),
    "text": text_format("t.txt", BYTES * 3),
    "split_on": text_format("t.txt", BYTES * 3, options=TextFormat(split_on="\n")),
    "utf16": text_format("t.txt", TEXT.encode("utf-16"), options=TextFormat(encoding="utf-16")),
    "jsonl": text_format("t.jsonl", LINES, mutate.json_lines),
    "chats": text_format("t.jsonl", CHATS, mutate.json_lines),
    "json_array": text_format(
        "t.json", b"[%s]" % b",".join(LINES.splitlines() + CHATS.splitlines()), mutate.json_file
    ),
    "json_array_raw": text_format("t.json", b"[%s]" % b",".join(LINES.splitlines())),
    "csv": text_format("t.csv", TABLE),
    "csv_replaced": text_format(
        "t.tsv", TABLE.replace(b",", b"\t"), options=TextFormat(encoding="utf-8:replace")
    ),
    "gz": text_format("t.txt.gz", gzip.compress(BYTES * 9)),
    "xz": text_format("t.txt.xz", lzma.compress(BYTES * 9)),
    "zst": text_format("t.txt.zst", zstandard.compress(BYTES * 9)),
    "parquet": text_format("t.parquet", parquet),
    "hellaswag": task_format("hellaswag", hellaswag()),
    "lambada": task_format("lambada", LINES),
}
