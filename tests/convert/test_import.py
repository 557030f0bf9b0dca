"""Models from elsewhere: what is read, and what is said about the way on where it is not."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gptforge import load
from gptforge.convert.hf import NATIVE_TOKENIZER, read_hf, write_hf
from gptforge.convert.hf_tokenizer import tokenizer_json
from gptforge.errors import UserError
from tests.convert.kinds import ROWS, TOKENIZERS
from tests.convert.test_hf import parts


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A model with GPT-2's tokenizer, as another program would have saved it."""
    folder = tmp_path_factory.mktemp("gpt2")
    write_hf(folder, parts(TOKENIZERS["gpt2"], ROWS["gpt2"]), card="# A model\n")
    (folder / NATIVE_TOKENIZER).unlink()
    return folder


@pytest.fixture
def theirs(gpt2, tmp_path) -> Path:
    return Path(shutil.copytree(gpt2, tmp_path / "theirs"))


def add_tokens(folder: Path, *tokens: str) -> None:
    path = folder / "tokenizer.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    first = len(record["model"]["vocab"])
    record["added_tokens"] += [
        {**record["added_tokens"][0], "id": first + i, "content": token}
        for i, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(record), encoding="utf-8")


def test_added_tokens_are_named_and_the_command_that_is_advised_works(theirs, program) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(theirs, local_files_only=True)
    model.resize_token_embeddings(50259, mean_resizing=False)
    # Not where it was loaded from: its tensors may still lie in that file.
    model.save_pretrained("grown")
    for path in Path("grown").iterdir():
        path.replace(theirs / path.name)
    add_tokens(theirs, "<|user|>", "<pad>")
    refused = program("import", "theirs", "out")
    assert refused.code == 2
    assert "added tokens, '<|user|>', '<pad>'" in refused.err
    # The same words lead on from every command that opens a model.
    assert "--tokenizer gpt2" in program("sample", "theirs", "--device", "cpu").err
    advised = refused.err[refused.err.index("gptforge import") :]
    command = shlex.split(advised.replace("OUT", "out"))[1:]
    assert command == ["import", "theirs", "out", "--tokenizer", "gpt2"]
    assert program(*command).code == 0
    ids = torch.tensor([[40, 41, 42]])
    with torch.inference_mode():
        wanted = model.eval()(ids).logits[0]
    found = load("out", device="cpu").logits(ids[0].tolist())
    torch.testing.assert_close(found[:, :50257], wanted[:, :50257], atol=1e-4, rtol=1e-4)


def test_added_tokens_behind_another_bpe_lead_to_a_copy_without_them(tmp_path, program) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_hf(folder, parts(TOKENIZERS["bpe"], ROWS["bpe"]), card="# A model\n")
    (folder / NATIVE_TOKENIZER).unlink()
    shutil.copy(folder / "tokenizer.json", tmp_path / "COPY.json")
    add_tokens(folder, "<pad>")
    refused = program("import", "theirs", "out")
    assert "--tokenizer COPY.json" in refused.err
    assert "gpt2" not in refused.err
    assert program("import", "theirs", "out", "--tokenizer", "COPY.json").code == 0
    assert load("out", device="cpu").tokenizer.to_json() == TOKENIZERS["bpe"].to_json()


def older_files(folder: Path, *, vocab: dict[str, int], added: dict[str, int]) -> None:
    merges = tokenizer_json(TOKENIZERS["gpt2"])["model"]["merges"]
    (folder / "tokenizer.json").unlink()
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")


def test_ids_of_an_older_vocabulary_are_checked(theirs) -> None:
    vocab = tokenizer_json(TOKENIZERS["gpt2"])["model"]["vocab"]
    older_files(theirs, vocab=vocab, added={})
    assert read_hf(theirs).tokenizer.name == "gpt2"
    (theirs / "added_tokens.json").write_text('{"<pad>": 50257}')
    with pytest.raises(UserError, match="added tokens, '<pad>'"):
        read_hf(theirs)
    # The mark first and all others one further on, as some programs train it.
    moved = {token: (i + 1) % len(vocab) for token, i in vocab.items()}
    (theirs / "vocab.json").write_text(json.dumps(moved))
    (theirs / "added_tokens.json").unlink()
    with pytest.raises(UserError, match="its ids are not bytes, merges"):
        read_hf(theirs)


def as_bin(folder: Path, tensors: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")  # noqa: TID251


def test_pytorch_model_bin_gives_the_same_weights(theirs, gpt2, program) -> None:
    tensors = load_file(theirs / "model.safetensors")
    as_bin(theirs, {f"transformer.{name}": tensor for name, tensor in tensors.items()})
    found, wanted = read_hf(theirs).state_dict, read_hf(gpt2).state_dict
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    # An import is known again by all that it was made of.
    small = ("--preset", "debug", "--device", "cpu", "--max_steps", 1, "--init_from", "theirs")
    Path("text.txt").write_text("To be, or not to be. " * 300)
    done = program(*small, "--input", "text.txt", "--out_dir", "a")
    assert done.code == 0, done.err
    torch.save({"wte.weight": torch.zeros(1)}, theirs / "pytorch_model.bin")  # noqa: TID251
    done = program(*small, "--input", "text.txt", "--out_dir", "b")
    assert done.code == 2, done.out
    single = program("import", "theirs/pytorch_model.bin", "out")
    assert "give the folder that it lies in" in single.err


@pytest.mark.parametrize("what", ["code", "list", "number"])
def test_a_bin_of_something_else_is_refused(theirs, tmp_path, what) -> None:
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    held = {"code": {"wte.weight": Trap()}, "list": [1, 2], "number": {"wte.weight": 3}}
    padding = torch.zeros(4_000_000)
    as_bin(theirs, held[what] if what == "list" else {**held[what], "padding": padding})
    with pytest.raises(UserError, match=r"pytorch_model\.bin|its weights have"):
        read_hf(theirs)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def no_network(monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("cannot reach it\nmore of the same")

    monkeypatch.setattr(hub, "snapshot_download", fail)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_without_a_network_the_way_on_is_said(program, no_network, play, name) -> None:
    told = ("hf download openai-community/gpt2 --local-dir gpt2", "copy that folder", "its path")
    begin = ("--init_from", name, "--preset", "debug", "--device", "cpu", "--input", play)
    for args in (("import", name, "out"), begin):
        done = program(*args)
        assert (done.code, done.err.count("error:")) == (2, 1), done.err
        assert "more of the same" not in done.err
        assert all(words in done.err for words in told), done.err
    for command in ("sample", "eval"):
        done = program(command, name, "--device", "cpu")
        assert (done.code, f"gptforge import {name} runs/gpt2" in done.err) == (2, True), done.err


def test_a_name_that_the_hub_does_not_know_is_no_matter_of_the_network(program, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import RepositoryNotFoundError

    class Answer:
        status_code, headers, request = 404, {}, None

    def fail(*_: object, **__: object) -> str:
        raise RepositoryNotFoundError("404", response=Answer())

    monkeypatch.setattr(hub, "snapshot_download", fail)
    done = program("import", "me/nothing", "out")
    assert (done.code, "check the name" in done.err, "hf download" in done.err) == (2, True, False)
