"""The GGUF file: read back, and by llama.cpp itself where it is installed."""

import math
from pathlib import Path

import pytest
import torch

from gptforge import load
from gptforge.builders.export_model import export_gguf
from gptforge.builders.load_model import load_bundle
from gptforge.config import GPTConfig
from gptforge.convert.bundle import (
    ModelBundle,
    probe_ids,
    unused_row_probability,
    with_eos_token,
)
from gptforge.convert.gguf import write_gguf
from gptforge.model import GPT
from gptforge.tokenizers.char import CharTokenizer
from tests.convert.kinds import ROWS, TEXTS, TOKENIZERS
from tests.train.runs import build

pytest.importorskip("gguf")


def parts(kind: str, rows: int) -> ModelBundle:
    config = GPTConfig(block_size=64, vocab_size=rows, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    tensors = {name: t.detach() for name, t in model.state_dict().items() if "lm_head" not in name}
    return ModelBundle(config, tensors, TOKENIZERS[kind])


@pytest.mark.parametrize(("kind", "most"), [("f32", 0.0), ("f16", 2e-3), ("q8_0", 0.05)])
def test_the_file_holds_the_model(tmp_path, kind, most) -> None:
    assert write_gguf(tmp_path / "m.gguf", parts("byte", 256), outtype=kind, name="m") <= most
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def fields(path: Path) -> dict[str, object]:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("letters", [63, 64])
def test_a_model_of_64_rows_has_an_end_of_text_id_however_many_letters(tmp_path, letters) -> None:
    # 64 characters fill a table of 64 rows: one more row is written, which no text leads to.
    made = parts("byte", 64)
    alphabet = CharTokenizer("".join(chr(ord("0") + i) for i in range(letters)))
    made = ModelBundle(made.config, made.state_dict, alphabet)
    assert write_gguf(tmp_path / "m.gguf", made, outtype="f32", name="m") == 0
    found = fields(tmp_path / "m.gguf")
    tokens = found["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[letters]) == (letters + 1, "<|endoftext|>")
    for which in ("bos", "eos", "unknown", "padding"):
        assert found[f"tokenizer.ggml.{which}_token_id"] == letters


def test_an_added_row_is_as_unlikely_as_the_least_likely_one() -> None:
    made = parts("byte", 256)
    grown, end = with_eos_token(made)
    assert (end, grown.config.vocab_size) == (256, 257)
    ids = probe_ids(made.config, 256)
    with torch.inference_mode():
        before, after = made.build_model()(ids), grown.build_model()(ids)
    assert torch.equal(after[..., :256], before)
    means = after.softmax(-1).mean((0, 1))
    assert means[256] == means.min()


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_file_says_what_it_holds(config, tmp_path, kind) -> None:
    import gguf

    build(config).fit()
    export_gguf(config.out_dir, tmp_path / "m.gguf", dtype=kind, log=lambda _: None)
    found = fields(tmp_path / "m.gguf")
    assert found["general.architecture"] == "gpt2"
    assert found["general.name"] == "run"
    assert "trained with GPT-Forge, on play.txt" in found["general.description"]
    assert found["general.size_label"].endswith("K")
    assert found["general.tags"] == ["text-generation", "gpt2"]
    wanted = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    assert found["general.file_type"] == wanted[kind]
    version = gguf.GGML_QUANT_VERSION if kind == "q8_0" else None
    assert found.get("general.quantization_version") == version
    # Nobody knows the licence of a text but who chose it.
    assert "general.license" not in found


def test_the_command_writes_one_file(config, program, tmp_path) -> None:
    build(config).fit()
    assert program("export", config.out_dir, "--to", "gguf", "a.gguf", "--type", "f32").code == 0
    assert program("export", config.out_dir, "--to", "gguf", "folder").code == 0
    assert Path("a.gguf").stat().st_size > Path("folder/model-f16.gguf").stat().st_size
    again = program("export", config.out_dir, "--to", "gguf", "a.gguf")
    assert (again.code, "there already" in again.err) == (2, True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_reads_the_same_tokenizer(tmp_path, kind) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    made = parts(kind, ROWS[kind])
    write_gguf(tmp_path / "m.gguf", made, outtype="f32", name="m")
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)
    for text in TEXTS:
        ids = made.tokenizer.encode(text).tolist()
        assert theirs.tokenize(text.encode(), add_bos=False) == ids
        assert theirs.detokenize(ids).decode() == text


def test_llama_cpp_writes_the_same_text_with_the_same_perplexity(config, tmp_path, play) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    build(config).fit()
    ours, text = load(config.out_dir, device="cpu"), play.read_text()[:31]
    ids = ours.encode(text)
    # Rows without a token are not in the file.
    known = ours.logits(ids).log_softmax(-1)
    loss = -float(known[torch.arange(len(ids) - 1), ids[1:]].mean())
    for kind in ("f32", "f16", "q8_0"):
        export_gguf(config.out_dir, tmp_path / f"{kind}.gguf", dtype=kind, log=lambda _: None)
        theirs = llama_cpp.Llama(
            str(tmp_path / f"{kind}.gguf"), n_ctx=32, logits_all=True, verbose=False
        )
        theirs.eval(ids)
        scores = torch.from_numpy(theirs.scores[: len(ids)].copy())[:, : ours.tokenizer.vocab_size]
        rows = scores.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        assert math.exp(-float(rows.mean())) == pytest.approx(math.exp(loss), rel=0.01), kind
        if kind == "f32":
            answer = theirs("ROMEO", max_tokens=12, temperature=0)["choices"][0]["text"]
            assert answer == ours.generate("ROMEO", 12, temperature=0)


def test_the_probability_of_an_id_that_only_the_file_has_is_said(config, program) -> None:
    build(config).fit()
    said: list[str] = []
    export_gguf(config.out_dir, Path("m.gguf"), dtype="f32", log=said.append)
    share = float(said[1].split("gives up to ")[1].split(" ")[0])
    opened = load_bundle(config.out_dir)
    ids, size = probe_ids(opened.config, opened.tokenizer.vocab_size), opened.tokenizer.vocab_size
    with torch.no_grad():
        probabilities = opened.build_model()(ids)[..., : size + 1].softmax(-1)
    assert share == pytest.approx(float(probabilities[..., size].max()), rel=0.05)
    assert share > 1e-4
    assert unused_row_probability(parts("byte with marks", 320)) == 0
    assert unused_row_probability(parts("byte", 256)) == 0


def test_what_is_opened_is_what_was_saved(config) -> None:
    build(config).fit()
    assert load_bundle(config.out_dir).tokenizer.name == "char"
