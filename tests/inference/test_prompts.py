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
from gptforge.data.dataset import DatasetOptions, open_dataset
from gptforge.inference.language_model import LanguageModel
from gptforge.inference.sampling import SamplingParams
from gptforge.presets import get_preset
from gptforge.tokenizers import Tokenizer, from_name
from gptforge.tokenizers import load as load_tokenizer
from gptforge.tokenizers import save as save_tokenizer
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer
from tests.programs import DEBUG
from tests.training.runs import build

EOT = "<|endoftext|>"


def write_documents(folder: Path) -> Path:
    """600 documents of one line, all beginning with the same word."""
    lines = [json.dumps({"text": f"Behold {i % 7} and {i % 11} lie here"}) for i in range(600)]
    path = folder / "documents.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_config(folder: Path, text: Path, **fields: object) -> Config:
    small = {"n_layer": 1, "n_embd": 32, "max_steps": 2, "warmup_steps": 1, "sample_every": 0}
    files = {"input": str(text), "out_dir": str(folder / "run"), "device": "cpu"}
    return dataclasses.replace(get_preset("debug"), max_lr=2e-2, **{**small, **files, **fields})


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path)


@pytest.fixture(scope="module")
def document_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Trained on documents for 60 steps."""
    folder = tmp_path_factory.mktemp("documents")
    config = make_config(folder, write_documents(folder), max_steps=60, warmup_steps=5)
    build(config).fit()
    return config


def empty_prompt(model: LanguageModel) -> str:
    return model.decode(model.encode_prompt(""))


def test_a_model_trained_on_documents_starts_a_document(document_run, program) -> None:
    model = load(document_run.out_dir, device="cpu")
    assert model.encode_prompt("") == [model.tokenizer.eot_token]
    texts = [model.generate("", 5, temperature=0.5, seed=seed) for seed in range(5)]
    assert {text[:2] for text in texts} == {"Be"}
    assert "".join(model.stream("", 5, temperature=0.5, seed=0)) == texts[0]
    sampling = SamplingParams(temperature=0.5)
    [completion] = model.generate_batch("", 5, sampling, seeds=0)
    assert completion.text == texts[0]
    tokens = model.stream_tokens("", 5, sampling, seed=0)
    assert "".join(token.text for token in tokens) == texts[0]
    flags = ("--max_new_tokens", 5, "--temperature", 0.5, "--seed", 0, "--device", "cpu")
    assert program("sample", document_run.out_dir, *flags).out == f"{texts[0]}\n"


def test_samples_during_training_start_a_document(document_run) -> None:
    run_dir = Path(document_run.out_dir)
    samples = (run_dir / "samples.md").read_text()
    model = load(run_dir / "checkpoints" / "last", device="cpu", dtype="float32")
    seed = document_run.seed + document_run.max_steps
    for prompt, is_expected in ((EOT, True), (" ", False)):
        text = model.generate(prompt, 40, seed=seed)
        assert (f"~~~text\n{text}" in samples) == is_expected


@pytest.mark.parametrize("tokenizer", ["gpt2", "char", "byte"])
def test_a_model_trained_on_one_text_starts_a_line(tmp_path, play, tokenizer) -> None:
    config = make_config(tmp_path, play, tokenizer=tokenizer)
    build(config).fit()
    model = load(config.out_dir, device="cpu")
    assert empty_prompt(model) == "\n"
    assert model.generate("", 9, seed=1) == model.generate("\n", 9, seed=1)


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte"])
def test_exports_and_imports_keep_the_empty_prompt(documents, tokenizer, tmp_path) -> None:
    config, hf = make_config(tmp_path, documents, tokenizer=tokenizer), tmp_path / "hf"
    build(config).fit()
    export_hf(config.out_dir, hf)
    export_space(config.out_dir, tmp_path / "space")
    import_model(str(hf), tmp_path / "back")
    for place in (config.out_dir, hf, tmp_path / "space", tmp_path / "back"):
        assert empty_prompt(load(place, device="cpu")) == EOT, place
    if tokenizer == "gpt2":
        # Without our tokenizer file, bos_token_id determines it.
        (hf / "gptforge_tokenizer.json").unlink()
        assert read_hf(hf).tokenizer.prepends_eot
        hf_config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps(hf_config | {"bos_token_id": None}))
        assert not read_hf(hf).tokenizer.prepends_eot


def test_shards_determine_the_empty_prompt(documents, play, program) -> None:
    tokenizer = from_name("gpt2", "")
    for text, expected in ((play, False), (documents, True)):
        shutil.rmtree("shards", ignore_errors=True)
        assert program("prepare", text, "--out", "shards", "--tokenizer", "gpt2").code == 0
        for is_prepared in (True, False):
            if not is_prepared:
                # As another program writes them.
                Path("shards/index.json").unlink()
                Path("shards/tokenizer.json").unlink()
            options = DatasetOptions(tokenizer=tokenizer, require_tokenizer=True)
            dataset = open_dataset(Path("shards"), options)
            assert dataset.tokenizer.prepends_eot == expected
            # A copy was changed.
            assert not tokenizer.prepends_eot
    assert np.any(dataset.train[:99] == tokenizer.eot_token)
    train = (*DEBUG, "--input", "shards", "--tokenizer", "gpt2", "--max_steps", 2)
    assert program(*train, "--out_dir", "run").code == 0
    assert empty_prompt(load("run", device="cpu")) == EOT


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


@pytest.mark.parametrize("with_eot", [True, False])
def test_a_prompt_is_read_as_a_training_text_is(tiny_model, with_eot) -> None:
    model = LanguageModel(tiny_model, ByteTokenizer(with_eot=with_eot))
    assert model.encode_prompt("\ufeffone\r\ntwo") == model.encode("one\ntwo")


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
