"""Importing nanoGPT's ckpt.pt, written as in its train.py."""

import copy
import dataclasses
import zipfile

import pytest
import torch

from gptforge import load
from gptforge.config import GPTConfig
from gptforge.convert.nanogpt import read_nanogpt
from gptforge.errors import UserError
from gptforge.model import GPT
from gptforge.tokenizers import from_name

TEXT = "To be, or not to be"


@pytest.fixture
def checkpoint(tiny_model: GPT) -> dict:
    state = {f"_orig_mod.{name}": tensor for name, tensor in tiny_model.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    return {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": {
            "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "bias": True,
            "vocab_size": 64, "dropout": 0.0,
        },
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char"},
    }  # fmt: skip


def save(checkpoint: dict, path) -> None:
    torch.save(checkpoint, path)  # noqa: TID251


def test_a_checkpoint_gives_the_same_logits(checkpoint, tiny_model, tmp_path) -> None:
    save(checkpoint, tmp_path / "ckpt.pt")
    model = read_nanogpt(tmp_path / "ckpt.pt", tokenizer=from_name("char", TEXT)).build_model()
    ids = torch.arange(16)[None]
    exact = GPT(dataclasses.replace(tiny_model.config, activation="gelu")).eval()
    exact.load_state_dict(tiny_model.state_dict())
    assert torch.equal(model(ids), exact(ids))


def test_missing_biases_are_zeros(checkpoint, tmp_path) -> None:
    checkpoint["model"] = {n: t for n, t in checkpoint["model"].items() if not n.endswith(".bias")}
    checkpoint["model_args"]["bias"] = False
    save(checkpoint, tmp_path / "ckpt.pt")
    bundle = read_nanogpt(tmp_path / "ckpt.pt", tokenizer=from_name("char", TEXT))
    assert not any(t.any() for n, t in bundle.state_dict.items() if n.endswith("bias"))


@pytest.mark.parametrize(
    ("rows", "letters", "fits"), [(65, 65, True), (65, 62, False), (64, 62, True), (128, 62, False)]
)
def test_the_text_of_another_model_is_refused(tmp_path, rows, letters, fits) -> None:
    # With other ids, the model would generate nonsense.
    config = GPTConfig(block_size=8, vocab_size=rows, n_layer=1, n_head=1, n_embd=8)
    model = GPT(config).init_weights()
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    model_args = {name: getattr(model.config, name) for name in names}
    save({"model": model.state_dict(), "model_args": model_args}, tmp_path / "ckpt.pt")
    alphabet = from_name("char", "".join(chr(ord("0") + i) for i in range(letters)))
    if fits:
        read_nanogpt(tmp_path / "ckpt.pt", tokenizer=alphabet)
        return
    with pytest.raises(UserError, match=f"{rows} ids, but --text has {letters} characters"):
        read_nanogpt(tmp_path / "ckpt.pt", tokenizer=alphabet)


def test_code_in_a_checkpoint_is_not_run(tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    save({"model": Trap()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="could run code"):
        read_nanogpt(tmp_path / "ckpt.pt")
    assert not (tmp_path / "sprung").exists()


def test_the_error_does_not_advise_to_trust_the_file(tmp_path) -> None:
    # torch's message advises to load such a file without checks.
    (tmp_path / "ckpt.pt").write_text("# A note\n")
    with pytest.raises(UserError) as refused:
        read_nanogpt(tmp_path / "ckpt.pt")
    assert "weights_only" not in str(refused.value)


def test_a_misshapen_tensor_is_named(checkpoint, tmp_path) -> None:
    checkpoint["model"]["_orig_mod.transformer.wpe.weight"] = torch.zeros(9, 16)
    save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"'transformer.wpe.weight' has shape \(9, 16\)"):
        read_nanogpt(tmp_path / "ckpt.pt", tokenizer=from_name("char", TEXT))
    (tmp_path / "ckpt.pt").write_bytes(b"something else")
    with pytest.raises(UserError):
        read_nanogpt(tmp_path / "ckpt.pt")


def test_the_command_needs_the_text_of_a_character_model(checkpoint, program, tmp_path) -> None:
    save(checkpoint, tmp_path / "ckpt.pt")
    (tmp_path / "text.txt").write_text(TEXT)
    refused = program("import", "ckpt.pt", "out")
    assert (refused.code, "--tokenizer char --text" in refused.err) == (2, True)
    done = program("import", "ckpt.pt", "out", "--tokenizer", "char", "--text", "text.txt")
    assert (done.code, done.out) == (0, ""), done.err
    assert set(load("out", device="cpu").generate("To", 30, seed=0)) <= set(TEXT)


def test_tensors_larger_than_their_file_are_refused(checkpoint, tmp_path) -> None:
    # A view of four bytes.
    path = tmp_path / "ckpt.pt"
    checkpoint["model_args"]["vocab_size"] = 10**9
    checkpoint["model"]["_orig_mod.transformer.wte.weight"] = torch.zeros(1).expand(10**9, 16)
    save(checkpoint, path)
    assert path.stat().st_size < 10**5
    with pytest.raises(UserError, match=r"the tensors have 64,\d+,\d+,\d+ bytes, but the file"):
        read_nanogpt(path)


def test_layers_that_share_storage_are_refused(checkpoint, tmp_path) -> None:
    first = "_orig_mod.transformer.h.0."
    for name, tensor in list(checkpoint["model"].items()):
        if name.startswith(first):
            for layer in range(1, 60):
                checkpoint["model"][name.replace(".h.0.", f".h.{layer}.")] = tensor
    checkpoint["model_args"]["n_layer"] = 60
    del checkpoint["optimizer"]
    save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="the tensors have"):
        read_nanogpt(tmp_path / "ckpt.pt", tokenizer=from_name("char", TEXT))


@pytest.mark.parametrize("kind", ["sparse", "bytearray"])
def test_types_of_unbounded_size_are_refused(checkpoint, tmp_path, kind) -> None:
    checkpoint["more"] = torch.zeros(3, 3).to_sparse() if kind == "sparse" else bytearray(3)
    save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=rf"it names \S*{kind}"):
        read_nanogpt(tmp_path / "ckpt.pt", tokenizer=from_name("char", TEXT))


@pytest.mark.parametrize("kind", ["compressed", "overlapping"])
def test_an_archive_larger_than_its_file_is_refused(checkpoint, tmp_path, kind) -> None:
    path = tmp_path / "ckpt.pt"
    save(checkpoint, path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            compression = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
            archive.writestr(name, content, compress_type=compression)
        if kind == "overlapping":
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            archive.filelist += [copy.copy(largest) for _ in range(100)]
    with pytest.raises(
        UserError, match="compressed" if kind == "compressed" else "it claims to hold"
    ):
        read_nanogpt(path, tokenizer=from_name("char", TEXT))


def test_a_legacy_file_is_refused_with_a_hint(checkpoint, tmp_path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)  # noqa: TID251
    with pytest.raises(UserError, match=r"PyTorch before 1\.6.* save it again with torch.save"):
        read_nanogpt(path, tokenizer=from_name("char", TEXT))


def test_a_flipped_byte_is_detected(checkpoint, tmp_path) -> None:
    # torch.load does not check the CRC-32 of a file's entries.
    path = tmp_path / "ckpt.pt"
    save(checkpoint, path)
    weights = checkpoint["model"]["_orig_mod.transformer.wpe.weight"].numpy().tobytes()
    damaged = bytearray(path.read_bytes())
    damaged[path.read_bytes().index(weights)] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"data/\d+ in it is damaged: copy the file once more"):
        read_nanogpt(path, tokenizer=from_name("char", TEXT))


def test_a_file_without_checksums_is_read(checkpoint, tmp_path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        save(checkpoint, tmp_path / "ckpt.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    bundle = read_nanogpt(tmp_path / "ckpt.pt", tokenizer=from_name("char", TEXT))
    weights = checkpoint["model"]["_orig_mod.transformer.wpe.weight"]
    assert torch.equal(bundle.state_dict["transformer.wpe.weight"], weights)


def test_a_file_without_its_end_is_called_incomplete(checkpoint, tmp_path) -> None:
    path = tmp_path / "ckpt.pt"
    save(checkpoint, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="or incomplete: copy the file once more"):
        read_nanogpt(path)
    torch.save(torch.zeros(2, 2), path)  # noqa: TID251
    with pytest.raises(UserError, match="Tensor instead of a dictionary"):
        read_nanogpt(path)


def test_weights_that_are_not_finite_are_refused(checkpoint, program, tmp_path) -> None:
    checkpoint["model"]["_orig_mod.transformer.ln_f.bias"] = torch.full((16,), float("nan"))
    checkpoint["model_args"]["vocab_size"] = 256
    checkpoint["model"]["_orig_mod.transformer.wte.weight"] = torch.zeros(256, 16)
    del checkpoint["model"]["_orig_mod.lm_head.weight"]
    save(checkpoint, tmp_path / "ckpt.pt")
    refused = program("import", "ckpt.pt", "out", "--tokenizer", "byte")
    assert refused.code == 2 and not (tmp_path / "out").exists()
    assert "ckpt.pt: 'transformer.ln_f.bias' holds NaN or Inf" in refused.err


def test_a_ckpt_pt_is_imported_before_it_is_used(checkpoint, program, play, tmp_path) -> None:
    save(checkpoint, tmp_path / "ckpt.pt")
    for command in ("sample", "eval"):
        refused = program(command, "ckpt.pt")
        assert (refused.code, "gptforge import ckpt.pt OUT" in refused.err) == (2, True)
    refused = program("--init_from", "ckpt.pt", "--input", play)
    assert refused.code == 2
    assert "gptforge import ckpt.pt OUT --tokenizer char --text FILE" in refused.err
