"""GGUF files, read back here and by llama.cpp where it is installed."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from gptforge import load
from gptforge.builders.export_model import export_gguf, export_hf
from gptforge.builders.load_model import load_saved
from gptforge.config import GPTConfig
from gptforge.convert.bundle import (
    WTE,
    ModelBundle,
    check_finite,
    probe_ids,
    unused_row_probability,
    with_eos_token,
)
from gptforge.convert.gguf import check_gguf, write_gguf
from gptforge.errors import RunError, UserError
from gptforge.model import GPT
from gptforge.tokenizers.char import CharTokenizer
from tests.convert.kinds import ROWS, TEXTS, TOKENIZERS

pytest.importorskip("gguf")


def make_bundle(kind: str, rows: int) -> ModelBundle:
    config = GPTConfig(block_size=64, vocab_size=rows, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    tensors = {name: t.detach() for name, t in model.state_dict().items() if "lm_head" not in name}
    return ModelBundle(config, tensors, TOKENIZERS[kind])


@pytest.mark.parametrize(("outtype", "tolerance"), [("f32", 0.0), ("f16", 2e-3), ("q8_0", 0.05)])
def test_the_file_has_the_same_logits(tmp_path, outtype, tolerance) -> None:
    path, bundle = tmp_path / "m.gguf", make_bundle("byte", 256)
    write_gguf(path, bundle, outtype=outtype, name="m")
    assert check_gguf(path, bundle, outtype=outtype) <= tolerance
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def fields(path: Path) -> dict[str, object]:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("letters", [63, 64])
def test_a_model_of_64_rows_gets_an_end_of_text_id(tmp_path, letters) -> None:
    # 64 characters fill 64 rows: one is appended.
    bundle = make_bundle("byte", 64)
    alphabet = CharTokenizer("".join(chr(ord("0") + i) for i in range(letters)))
    bundle = ModelBundle(bundle.config, bundle.state_dict, alphabet)
    write_gguf(tmp_path / "m.gguf", bundle, outtype="f32", name="m")
    assert check_gguf(tmp_path / "m.gguf", bundle, outtype="f32") == 0
    metadata = fields(tmp_path / "m.gguf")
    tokens = metadata["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[letters]) == (letters + 1, "<|endoftext|>")
    for which in ("bos", "eos", "unknown", "padding"):
        assert metadata[f"tokenizer.ggml.{which}_token_id"] == letters


def test_an_appended_row_is_as_unlikely_as_the_least_likely_one() -> None:
    bundle = make_bundle("byte", 256)
    grown, eos_id = with_eos_token(bundle)
    assert (eos_id, grown.config.vocab_size) == (256, 257)
    ids = probe_ids(bundle.config, 256)
    with torch.inference_mode():
        before, after = bundle.build_model()(ids), grown.build_model()(ids)
    assert torch.equal(after[..., :256], before)
    means = after.softmax(-1).mean((0, 1))
    assert means[256] == means.min()


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_metadata(run, tmp_path, outtype) -> None:
    import gguf

    export_gguf(run, tmp_path / "m.gguf", dtype=outtype)
    metadata = fields(tmp_path / "m.gguf")
    assert metadata["general.architecture"] == "gpt2"
    assert metadata["general.name"] == "run"
    assert "trained with GPT-Forge, on play.txt" in metadata["general.description"]
    assert metadata["general.size_label"].endswith("K")
    assert metadata["general.tags"] == ["text-generation", "gpt2"]
    file_types = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    assert metadata["general.file_type"] == file_types[outtype]
    version = gguf.GGML_QUANT_VERSION if outtype == "q8_0" else None
    assert metadata.get("general.quantization_version") == version
    # The licence depends on the training text.
    assert "general.license" not in metadata


def test_the_command_writes_one_file(run, program, tmp_path) -> None:
    assert program("export", run, "--to", "gguf", "a.gguf", "--type", "f32").code == 0
    assert program("export", run, "--to", "gguf", "folder").code == 0
    assert Path("a.gguf").stat().st_size > Path("folder/model-f16.gguf").stat().st_size
    Path("notes.txt").write_text("not a folder", "utf-8")
    for name in ("a.gguf", "notes.txt"):
        again = program("export", run, "--to", "gguf", name)
        assert (again.code, "already exists" in again.err) == (2, True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_reads_the_same_tokenizer(tmp_path, kind) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    bundle = make_bundle(kind, ROWS[kind])
    write_gguf(tmp_path / "m.gguf", bundle, outtype="f32", name="m")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)
    for text in TEXTS:
        ids = bundle.tokenizer.encode(text).tolist()
        assert llama.tokenize(text.encode(), add_bos=False) == ids
        assert llama.detokenize(ids).decode() == text


def test_llama_cpp_gives_the_same_text_and_perplexity(run, tmp_path, play) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model, text = load(run, device="cpu"), play.read_text()[:31]
    ids = model.encode(text)
    # Padding rows are not in the file.
    logprobs = model.logits(ids).log_softmax(-1)
    loss = -float(logprobs[torch.arange(len(ids) - 1), ids[1:]].mean())
    for outtype in ("f32", "f16", "q8_0"):
        export_gguf(run, tmp_path / f"{outtype}.gguf", dtype=outtype)
        llama = llama_cpp.Llama(
            str(tmp_path / f"{outtype}.gguf"), n_ctx=32, logits_all=True, verbose=False
        )
        llama.eval(ids)
        scores = torch.from_numpy(llama.scores[: len(ids)].copy())[:, : model.tokenizer.vocab_size]
        rows = scores.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        assert math.exp(-float(rows.mean())) == pytest.approx(math.exp(loss), rel=0.01), outtype
        if outtype == "f32":
            answer = llama("ROMEO", max_tokens=12, temperature=0)["choices"][0]["text"]
            assert answer == model.generate("ROMEO", 12, temperature=0)


def test_the_probability_of_an_unused_row_is_reported(run, program, messages) -> None:
    export_gguf(run, Path("m.gguf"), dtype="f32")
    export_hf(run, Path("hf"))
    notes = [line for line in messages if "probability of up to " in line]
    assert len(notes) == 2 and notes[0] == notes[1]
    reported = float(notes[0].split("probability of up to ")[1].split(",")[0])
    opened = load_saved(run).bundle
    ids, size = probe_ids(opened.config, opened.tokenizer.vocab_size), opened.tokenizer.vocab_size
    with torch.no_grad():
        probabilities = opened.build_model()(ids)[..., : size + 1].softmax(-1)
    assert reported == pytest.approx(float(probabilities[..., size].max()), rel=0.05)
    assert reported > 1e-4
    assert unused_row_probability(make_bundle("byte with eot", 320)) == 0
    assert unused_row_probability(make_bundle("byte", 256)) == 0


def test_a_run_has_its_tokenizer(run) -> None:
    assert load_saved(run).bundle.tokenizer.name == "char"


def test_a_model_of_another_program_is_not_said_to_be_trained_here(tmp_path) -> None:
    from gptforge.builders.export_model import bundle_toml
    from gptforge.checkpoint.format import MODEL, save_checkpoint

    bundle = make_bundle("byte", 256)
    (tmp_path / "imported").mkdir()
    save_checkpoint(
        tmp_path / "imported",
        {MODEL: dict(bundle.state_dict)},
        tokenizer=bundle.tokenizer,
        config=bundle_toml(bundle),
    )
    export_gguf(str(tmp_path / "imported"), tmp_path / "m.gguf", dtype="f16")
    description = fields(tmp_path / "m.gguf")["general.description"]
    assert description.endswith(" parameters, exported with GPT-Forge")


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_weights_that_are_not_finite_in_the_file_are_not_kept(tmp_path) -> None:
    bundle = make_bundle("byte", 256)
    large = {**bundle.state_dict, WTE: bundle.state_dict[WTE] * 1e9}
    bundle = dataclasses.replace(bundle, state_dict=large)  # more than float16 holds
    write_gguf(tmp_path / "m.gguf", bundle, outtype="f16", name="m")
    with pytest.raises(RunError, match=r"NaN or Inf: it was not kept; .* use --type f32"):
        check_gguf(tmp_path / "m.gguf", bundle, outtype="f16")
    with pytest.raises(UserError, match=r"run: 'transformer\.wte\.weight' holds NaN or Inf"):
        check_finite({WTE: torch.tensor([1.0, float("inf")])}, "run")
