"""What a prompt begins with: a document's beginning where the model has learned from documents."""

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

MARK = "<|endoftext|>"


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """600 documents of a line each, which all begin with a word that nothing else begins with."""
    lines = [json.dumps({"text": f"Behold {i % 7} and {i % 11} lie here"}) for i in range(600)]
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def of_documents(documents: Path, tmp_path: Path) -> Config:
    small = {"n_layer": 1, "n_embd": 32, "max_steps": 60, "warmup_steps": 5, "sample_every": 0}
    files = {"input": str(documents), "out_dir": str(tmp_path / "run"), "device": "cpu"}
    return dataclasses.replace(get_preset("debug"), max_lr=2e-2, **small, **files)


def opening(writer: LanguageModel) -> str:
    return writer.decode(writer.encode_prompt(""))


def test_a_model_of_documents_begins_at_a_documents_beginning(of_documents, program) -> None:
    build(of_documents).fit()
    writer = load(of_documents.out_dir, device="cpu")
    assert writer.encode_prompt("") == [writer.tokenizer.eot_token]
    texts = [writer.generate("", 5, temperature=0.5, seed=seed) for seed in range(5)]
    assert {text[:2] for text in texts} == {"Be"}
    # And so do all ways to write.
    assert "".join(writer.stream("", 5, temperature=0.5, seed=0)) == texts[0]
    settings = SamplingParams(temperature=0.5)
    [writing] = writer.generate_batch("", 5, settings, seeds=0)
    assert writing.text == texts[0]
    *_, shown = generate_with_limits(writer, "", max_new_tokens=5, params=settings, seed=0)
    assert "".join(token.text for token in shown.tokens) == texts[0]
    flags = ("--max_new_tokens", 5, "--temperature", 0.5, "--seed", 0, "--device", "cpu")
    assert program("sample", of_documents.out_dir, *flags).out == f"{texts[0]}\n"


def test_samples_of_a_training_begin_there_as_well(of_documents) -> None:
    build(of_documents).fit()
    samples = (Path(of_documents.out_dir) / "samples.md").read_text()
    writer = load(
        Path(of_documents.out_dir) / "checkpoints" / "last", device="cpu", dtype="float32"
    )
    seed = of_documents.seed + of_documents.max_steps
    for prompt, is_there in ((MARK, True), (" ", False)):
        text = writer.generate(prompt, 40, seed=seed)
        assert (f"~~~text\n{text}" in samples) == is_there


@pytest.mark.parametrize("tokenizer", ["gpt2", "char", "byte"])
def test_of_one_text_it_begins_with_a_line(of_documents, play, tokenizer) -> None:
    config = dataclasses.replace(of_documents, input=str(play), tokenizer=tokenizer, max_steps=2)
    build(dataclasses.replace(config, warmup_steps=1)).fit()
    writer = load(config.out_dir, device="cpu")
    assert opening(writer) == "\n"
    assert writer.generate("", 9, seed=1) == writer.generate("\n", 9, seed=1)


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte"])
def test_the_beginning_goes_with_the_model_wherever_it_goes(
    of_documents, tokenizer, tmp_path
) -> None:
    config = dataclasses.replace(of_documents, tokenizer=tokenizer, max_steps=2, warmup_steps=1)
    build(config).fit()
    export_hf(config.out_dir, tmp_path / "hf", log=lambda _: None)
    export_space(config.out_dir, tmp_path / "space", log=lambda _: None)
    import_model(str(tmp_path / "hf"), tmp_path / "back", log=lambda _: None)
    for place in (config.out_dir, tmp_path / "hf", tmp_path / "space", tmp_path / "back"):
        assert opening(load(place, device="cpu")) == MARK, place


def test_prepared_shards_and_those_of_others_say_it_too(documents, play, program) -> None:
    for text, expected in ((documents, MARK), (play, "\n")):
        shutil.rmtree("shards", ignore_errors=True)
        assert program("prepare", text, "--out", "shards", "--tokenizer", "gpt2").code == 0
        for is_prepared in (True, False):
            if not is_prepared:
                # As another program leaves them.
                Path("shards/index.json").unlink()
                Path("shards/tokenizer.json").unlink()
            few = ("--max_steps", 2, "--tokenizer", "gpt2", "--overwrite", "--out_dir", "run")
            assert program(*DEBUG, "--input", "shards", *few).code == 0
            assert opening(load("run", device="cpu")) == expected


def test_a_gpt2_from_elsewhere_begins_as_its_configuration_says(tmp_path, of_documents) -> None:
    few = dataclasses.replace(of_documents, tokenizer="gpt2", max_steps=2, warmup_steps=1)
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
def test_the_mark_can_be_given_in_a_prompt(tiny_model, tokenizer) -> None:
    writer, end = LanguageModel(tiny_model, tokenizer), tokenizer.eot_token
    a, b = writer.encode("a"), writer.encode("b")
    assert writer.encode_prompt(MARK) == [end]
    assert writer.encode_prompt(f"a{MARK}b") == [*a, end, *b]
    assert writer.encode_prompt(f"{MARK}{MARK}b{MARK}") == [end, end, *b, end]
    assert writer.decode(writer.encode_prompt(f"a{MARK}b")) == f"a{MARK}b"


def test_without_a_mark_it_is_characters(tiny_model) -> None:
    writer = LanguageModel(tiny_model, ByteTokenizer())
    assert writer.encode_prompt(MARK) == writer.encode(MARK) == list(MARK.encode())


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("tokenizer", [from_name("gpt2", ""), ByteTokenizer(with_eot=True)])
def test_a_tokenizers_file_says_whether_documents_were_marked(
    tmp_path, tokenizer: Tokenizer, marks
) -> None:
    tokenizer.prepends_eot = marks
    save_tokenizer(tokenizer, tmp_path / "t.json")
    again = load_tokenizer(tmp_path / "t.json")
    assert again.prepends_eot == marks
    # What the ids mean is the same either way.
    assert again.to_json() == tokenizer.to_json()


def test_a_file_of_an_earlier_version_begins_a_line_with_gpt2s_vocabulary(tmp_path) -> None:
    for tokenizer, expected in (
        (from_name("gpt2", ""), False),
        (ByteTokenizer(with_eot=True), True),
    ):
        save_tokenizer(tokenizer, tmp_path / "t.json")
        record = json.loads((tmp_path / "t.json").read_text())
        del record["marks_documents"]
        (tmp_path / "t.json").write_text(json.dumps(record))
        assert load_tokenizer(tmp_path / "t.json").prepends_eot == expected


def test_opening_shards_leaves_the_tokenizer_that_was_given_as_it_is(program, documents) -> None:
    from gptforge.data.dataset import DatasetOptions, open_dataset

    assert program("prepare", documents, "--out", "shards", "--tokenizer", "gpt2").code == 0
    Path("shards/index.json").unlink()
    given = from_name("gpt2", "")
    corpus = open_dataset(Path("shards"), DatasetOptions(given, require_tokenizer=True), log=print)
    assert corpus.tokenizer.prepends_eot and not given.prepends_eot
    assert np.any(corpus.train[:99] == given.eot_token)
