"""Prompts: the end-of-text token, and what an empty prompt stands for."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptforge import load
from gptforge.builders.export_model import export_hf, export_space
from gptforge.builders.import_model import import_model
from gptforge.config import Config
from gptforge.convert.hf import read_hf
from gptforge.demo.sessions import generate_with_limits
from gptforge.inference.language_model import LanguageModel
from gptforge.inference.sampling import SamplingParams
from gptforge.presets import get_preset
from gptforge.tokenizers import Tokenizer, from_name
from gptforge.tokenizers import load as load_tokenizer
from gptforge.tokenizers import save as save_tokenizer
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer
from tests.programs import DEBUG
from tests.train.runs import build

EOT = "<|endoftext|>"


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """600 documents of one line, all beginning with the same word."""
    lines = [json.dumps({"text": f"Behold {i % 7} and {i % 11} lie here"}) for i in range(600)]
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def document_config(documents: Path, tmp_path: Path) -> Config:
    small = {"n_layer": 1, "n_embd": 32, "max_steps": 60, "warmup_steps": 5, "sample_every": 0}
    files = {"input": str(documents), "out_dir": str(tmp_path / "run"), "device": "cpu"}
    return dataclasses.replace(get_preset("debug"), max_lr=2e-2, **small, **files)


def empty_prompt(model: LanguageModel) -> str:
    return model.decode(model.encode_prompt(""))


def test_a_model_trained_on_documents_starts_a_document(document_config, program) -> None:
    build(document_config).fit()
    model = load(document_config.out_dir, device="cpu")
    assert model.encode_prompt("") == [model.tokenizer.eot_token]
    texts = [model.generate("", 5, temperature=0.5, seed=seed) for seed in range(5)]
    assert {text[:2] for text in texts} == {"Be"}
    assert "".join(model.stream("", 5, temperature=0.5, seed=0)) == texts[0]
    sampling = SamplingParams(temperature=0.5)
    [completion] = model.generate_batch("", 5, sampling, seeds=0)
    assert completion.text == texts[0]
    *_, last = generate_with_limits(model, "", max_new_tokens=5, params=sampling, seed=0)
    assert "".join(token.text for token in last.tokens) == texts[0]
    flags = ("--max_new_tokens", 5, "--temperature", 0.5, "--seed", 0, "--device", "cpu")
    assert program("sample", document_config.out_dir, *flags).out == f"{texts[0]}\n"


def test_samples_during_training_start_a_document(document_config) -> None:
    build(document_config).fit()
    samples = (Path(document_config.out_dir) / "samples.md").read_text()
    model = load(
        Path(document_config.out_dir) / "checkpoints" / "last", device="cpu", dtype="float32"
    )
    seed = document_config.seed + document_config.max_steps
    for prompt, is_expected in ((EOT, True), (" ", False)):
        text = model.generate(prompt, 40, seed=seed)
        assert (f"~~~text\n{text}" in samples) == is_expected


@pytest.mark.parametrize("tokenizer", ["gpt2", "char", "byte"])
def test_a_model_trained_on_one_text_starts_a_line(document_config, play, tokenizer) -> None:
    config = dataclasses.replace(document_config, input=str(play), tokenizer=tokenizer, max_steps=2)
    build(dataclasses.replace(config, warmup_steps=1)).fit()
    model = load(config.out_dir, device="cpu")
    assert empty_prompt(model) == "\n"
    assert model.generate("", 9, seed=1) == model.generate("\n", 9, seed=1)


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte"])
def test_exports_and_imports_keep_the_empty_prompt(document_config, tokenizer, tmp_path) -> None:
    config = dataclasses.replace(document_config, tokenizer=tokenizer, max_steps=2, warmup_steps=1)
    build(config).fit()
    export_hf(config.out_dir, tmp_path / "hf", log=lambda _: None)
    export_space(config.out_dir, tmp_path / "space", log=lambda _: None)
    import_model(str(tmp_path / "hf"), tmp_path / "back", log=lambda _: None)
    for place in (config.out_dir, tmp_path / "hf", tmp_path / "space", tmp_path / "back"):
        assert empty_prompt(load(place, device="cpu")) == EOT, place


def test_shards_determine_the_empty_prompt(documents, play, program) -> None:
    for text, expected in ((documents, EOT), (play, "\n")):
        shutil.rmtree("shards", ignore_errors=True)
        assert program("prepare", text, "--out", "shards", "--tokenizer", "gpt2").code == 0
        for is_prepared in (True, False):
            if not is_prepared:
                # As another program writes them.
                Path("shards/index.json").unlink()
                Path("shards/tokenizer.json").unlink()
            few = ("--max_steps", 2, "--tokenizer", "gpt2", "--overwrite", "--out_dir", "run")
            assert program(*DEBUG, "--input", "shards", *few).code == 0
            assert empty_prompt(load("run", device="cpu")) == expected


def test_bos_token_id_determines_the_empty_prompt(tmp_path, document_config) -> None:
    few = dataclasses.replace(document_config, tokenizer="gpt2", max_steps=2, warmup_steps=1)
    build(few).fit()
    export_hf(few.out_dir, tmp_path / "hf", log=lambda _: None)
    (tmp_path / "hf" / "gptforge_tokenizer.json").unlink()
    assert read_hf(tmp_path / "hf").tokenizer.prepends_eot
    facts = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(facts | {"bos_token_id": None}))
    assert not read_hf(tmp_path / "hf").tokenizer.prepends_eot


@pytest.mark.parametrize(
    "tokenizer",
    [from_name("gpt2", ""), ByteTokenizer(with_eot=True), CharTokenizer("ab", with_eot=True)],
)
def test_a_prompt_may_contain_the_end_of_text_token(tiny_model, tokenizer) -> None:
    model, eot = LanguageModel(tiny_model, tokenizer), tokenizer.eot_token
    a, b = model.encode("a"), model.encode("b")
    assert model.encode_prompt(EOT) == [eot]
    assert model.encode_prompt(f"a{EOT}b") == [*a, eot, *b]
    assert model.encode_prompt(f"{EOT}{EOT}b{EOT}") == [eot, eot, *b, eot]
    assert model.decode(model.encode_prompt(f"a{EOT}b")) == f"a{EOT}b"


def test_without_an_end_of_text_token_it_is_encoded_as_text(tiny_model) -> None:
    model = LanguageModel(tiny_model, ByteTokenizer())
    assert model.encode_prompt(EOT) == model.encode(EOT) == list(EOT.encode())


@pytest.mark.parametrize("prepends_eot", [True, False])
@pytest.mark.parametrize("tokenizer", [from_name("gpt2", ""), ByteTokenizer(with_eot=True)])
def test_a_saved_tokenizer_keeps_prepends_eot(tmp_path, tokenizer: Tokenizer, prepends_eot) -> None:
    tokenizer.prepends_eot = prepends_eot
    save_tokenizer(tokenizer, tmp_path / "t.json")
    loaded = load_tokenizer(tmp_path / "t.json")
    assert loaded.prepends_eot == prepends_eot
    assert loaded.to_json() == tokenizer.to_json()


def test_a_tokenizer_saved_by_an_earlier_version_has_a_default(tmp_path) -> None:
    for tokenizer, expected in (
        (from_name("gpt2", ""), False),
        (ByteTokenizer(with_eot=True), True),
    ):
        save_tokenizer(tokenizer, tmp_path / "t.json")
        record = json.loads((tmp_path / "t.json").read_text())
        del record["marks_documents"]
        (tmp_path / "t.json").write_text(json.dumps(record))
        assert load_tokenizer(tmp_path / "t.json").prepends_eot == expected


def test_opening_shards_does_not_change_the_given_tokenizer(program, documents) -> None:
    from gptforge.data.dataset import DatasetOptions, open_dataset

    assert program("prepare", documents, "--out", "shards", "--tokenizer", "gpt2").code == 0
    Path("shards/index.json").unlink()
    tokenizer = from_name("gpt2", "")
    dataset = open_dataset(
        Path("shards"), DatasetOptions(tokenizer, require_tokenizer=True), log=print
    )
    assert dataset.tokenizer.prepends_eot and not tokenizer.prepends_eot
    assert np.any(dataset.train[:99] == tokenizer.eot_token)
