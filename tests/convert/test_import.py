"""Importing models of other programs: what is read, and the hints where it is not."""

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
from tests.convert.test_hf import make_bundle


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A model with GPT-2's tokenizer, as another program would save it."""
    folder = tmp_path_factory.mktemp("gpt2")
    write_hf(folder, make_bundle(TOKENIZERS["gpt2"], ROWS["gpt2"]), card="# A model\n")
    (folder / NATIVE_TOKENIZER).unlink()
    return folder


@pytest.fixture
def model_dir(gpt2, tmp_path) -> Path:
    return Path(shutil.copytree(gpt2, tmp_path / "model_dir"))


def add_tokens(folder: Path, *tokens: str) -> None:
    path = folder / "tokenizer.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    first = len(record["model"]["vocab"])
    record["added_tokens"] += [
        {**record["added_tokens"][0], "id": first + i, "content": token}
        for i, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(record), encoding="utf-8")


def test_added_tokens_are_named_with_a_command_that_works(model_dir, program) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(model_dir, local_files_only=True)
    model.resize_token_embeddings(50259, mean_resizing=False)
    # Not into the same folder: the tensors may be mapped from its file.
    model.save_pretrained("grown")
    for path in Path("grown").iterdir():
        path.replace(model_dir / path.name)
    add_tokens(model_dir, "<|user|>", "<pad>")
    refused = program("import", "model_dir", "out")
    assert refused.code == 2
    assert "added tokens, '<|user|>', '<pad>'" in refused.err
    # Every command that opens a model has the same hint.
    assert "--tokenizer gpt2" in program("sample", "model_dir", "--device", "cpu").err
    hint = refused.err[refused.err.index("gptforge import") :]
    command = shlex.split(hint.replace("OUT", "out"))[1:]
    assert command == ["import", "model_dir", "out", "--tokenizer", "gpt2"]
    assert program(*command).code == 0
    ids = torch.tensor([[40, 41, 42]])
    with torch.inference_mode():
        expected = model.eval()(ids).logits[0]
    logits = load("out", device="cpu").logits(ids[0].tolist())
    torch.testing.assert_close(logits[:, :50257], expected[:, :50257], atol=1e-4, rtol=1e-4)


def test_added_tokens_of_another_bpe_can_be_removed_in_a_copy(tmp_path, program) -> None:
    folder = tmp_path / "model_dir"
    folder.mkdir()
    write_hf(folder, make_bundle(TOKENIZERS["bpe"], ROWS["bpe"]), card="# A model\n")
    (folder / NATIVE_TOKENIZER).unlink()
    shutil.copy(folder / "tokenizer.json", tmp_path / "COPY.json")
    add_tokens(folder, "<pad>")
    refused = program("import", "model_dir", "out")
    assert "--tokenizer COPY.json" in refused.err
    assert "gpt2" not in refused.err
    assert program("import", "model_dir", "out", "--tokenizer", "COPY.json").code == 0
    assert load("out", device="cpu").tokenizer.to_json() == TOKENIZERS["bpe"].to_json()


def write_merges_txt(folder: Path, *, vocab: dict[str, int], added: dict[str, int]) -> None:
    merges = tokenizer_json(TOKENIZERS["gpt2"])["model"]["merges"]
    (folder / "tokenizer.json").unlink()
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")


def test_ids_of_vocab_json_are_checked(model_dir) -> None:
    vocab = tokenizer_json(TOKENIZERS["gpt2"])["model"]["vocab"]
    write_merges_txt(model_dir, vocab=vocab, added={})
    assert read_hf(model_dir).tokenizer.name == "gpt2"
    (model_dir / "added_tokens.json").write_text('{"<pad>": 50257}')
    with pytest.raises(UserError, match="added tokens, '<pad>'"):
        read_hf(model_dir)
    # End-of-text first and all others shifted by one, as some programs train it.
    moved = {token: (i + 1) % len(vocab) for token, i in vocab.items()}
    (model_dir / "vocab.json").write_text(json.dumps(moved))
    (model_dir / "added_tokens.json").unlink()
    with pytest.raises(UserError, match="the ids are not bytes, merges"):
        read_hf(model_dir)


def save_as_bin(folder: Path, tensors: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")  # noqa: TID251


def test_pytorch_model_bin_gives_the_same_weights(model_dir, gpt2, program) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    save_as_bin(model_dir, {f"transformer.{name}": tensor for name, tensor in tensors.items()})
    loaded, expected = read_hf(model_dir).state_dict, read_hf(gpt2).state_dict
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    # Another weights file is another import.
    small = ("--preset", "debug", "--device", "cpu", "--max_steps", 1, "--init_from", "model_dir")
    Path("text.txt").write_text("To be, or not to be. " * 300)
    done = program(*small, "--input", "text.txt", "--out_dir", "a")
    assert done.code == 0, done.err
    torch.save({"wte.weight": torch.zeros(1)}, model_dir / "pytorch_model.bin")  # noqa: TID251
    done = program(*small, "--input", "text.txt", "--out_dir", "b")
    assert done.code == 2, done.out
    single = program("import", "model_dir/pytorch_model.bin", "out")
    assert "give the folder that it is in" in single.err


@pytest.mark.parametrize("what", ["code", "list", "number"])
def test_a_bin_file_of_something_else_is_refused(model_dir, tmp_path, what) -> None:
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    contents = {"code": {"wte.weight": Trap()}, "list": [1, 2], "number": {"wte.weight": 3}}
    padding = torch.zeros(4_000_000)
    save_as_bin(
        model_dir, contents[what] if what == "list" else {**contents[what], "padding": padding}
    )
    with pytest.raises(UserError, match=r"pytorch_model\.bin|the weights have"):
        read_hf(model_dir)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def no_network(monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("cannot reach it\nmore of the same")

    monkeypatch.setattr(hub, "snapshot_download", fail)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_without_a_network_there_is_a_hint(program, no_network, play, name) -> None:
    hints = ("hf download openai-community/gpt2 --local-dir gpt2", "copy that folder", "its path")
    train = ("--init_from", name, "--preset", "debug", "--device", "cpu", "--input", play)
    for args in (("import", name, "out"), train):
        done = program(*args)
        assert (done.code, done.err.count("error:")) == (2, 1), done.err
        assert "more of the same" not in done.err
        assert all(words in done.err for words in hints), done.err
    for command in ("sample", "eval"):
        done = program(command, name, "--device", "cpu")
        assert (done.code, f"gptforge import {name} runs/gpt2" in done.err) == (2, True), done.err


def test_an_unknown_repository_is_not_called_a_network_problem(program, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import RepositoryNotFoundError

    class Response:
        status_code, headers, request = 404, {}, None

    def fail(*_: object, **__: object) -> str:
        raise RepositoryNotFoundError("404", response=Response())

    monkeypatch.setattr(hub, "snapshot_download", fail)
    done = program("import", "me/nothing", "out")
    assert (done.code, "check the name" in done.err, "hf download" in done.err) == (2, True, False)
