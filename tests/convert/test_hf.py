"""To transformers and back, with no network."""

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gptforge import files, load
from gptforge.builders.export_model import export_hf
from gptforge.builders.import_model import import_if_needed, import_model
from gptforge.checkpoint.store import INFERENCE_FILES, find_corruption
from gptforge.config import GPTConfig
from gptforge.convert import hf
from gptforge.convert.bundle import ModelBundle
from gptforge.convert.hf import read_hf, write_hf
from gptforge.convert.hf_tokenizer import tokenizer_json
from gptforge.convert.model_card import example_prompt
from gptforge.errors import RunError, UserError
from gptforge.model import GPT
from gptforge.tokenizers import from_name
from tests.convert.kinds import ROWS, TEXTS, TOKENIZERS
from tests.train.runs import build

EVERY_KIND = pytest.mark.parametrize("kind", TOKENIZERS)


def parts(tokenizer, vocab_size: int) -> ModelBundle:
    config = GPTConfig(block_size=24, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    tensors = {name: t.detach() for name, t in model.state_dict().items() if "lm_head" not in name}
    return ModelBundle(config, tensors, tokenizer)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for kind, tokenizer in TOKENIZERS.items():
        made[kind] = tmp_path_factory.mktemp(kind.split()[0])
        write_hf(made[kind], parts(tokenizer, ROWS[kind]), card="# A model\n")
    return made


@EVERY_KIND
def test_transformers_reads_the_same_tokenizer(exports, kind) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(exports[kind], local_files_only=True)
    ours = TOKENIZERS[kind]
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    assert len(theirs) == ours.vocab_size + (ours.eot_token is None)


@EVERY_KIND
def test_the_end_of_text_has_an_id_in_every_file(exports, kind) -> None:
    ours = TOKENIZERS[kind]
    end = ours.vocab_size if ours.eot_token is None else ours.eot_token
    theirs = transformers.AutoTokenizer.from_pretrained(exports[kind], local_files_only=True)
    for name in ("bos", "eos", "unk", "pad"):
        assert getattr(theirs, f"{name}_token") == "<|endoftext|>"
        assert getattr(theirs, f"{name}_token_id") == end
    for file in ("config.json", "generation_config.json"):
        found = json.loads((exports[kind] / file).read_text())
        assert [found[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [end] * 3
    assert json.loads((exports[kind] / "config.json").read_text())["vocab_size"] == len(theirs)


def test_tensors_have_openais_names_and_transformers_misses_none(exports) -> None:
    with safe_open(exports["char"] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"wte.weight", "wpe.weight", "h.0.ln_1.weight", "ln_f.bias"} <= names
    assert not any(name.startswith(("transformer.", "lm_head.")) for name in names)
    theirs, said = transformers.GPT2LMHeadModel.from_pretrained(
        exports["char"], local_files_only=True, output_loading_info=True
    )
    assert {name: list(found) for name, found in said.items() if found} == {}
    assert theirs.lm_head.weight is theirs.transformer.wte.weight


def test_an_export_of_an_earlier_version_comes_back(exports, tmp_path) -> None:
    # Names began with `transformer.`, there was no id for the end, and no row for it.
    shutil.copytree(exports["char"], tmp_path / "old")
    path, size = tmp_path / "old/model.safetensors", TOKENIZERS["char"].vocab_size
    tensors = {f"transformer.{name}": tensor for name, tensor in load_file(path).items()}
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:size].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    facts = json.loads((tmp_path / "old/config.json").read_text())
    facts |= {"vocab_size": size, "bos_token_id": None, "eos_token_id": None}
    (tmp_path / "old/config.json").write_text(json.dumps(facts))
    old, new = read_hf(tmp_path / "old"), read_hf(exports["char"])
    for name, tensor in old.state_dict.items():
        assert torch.equal(tensor, new.state_dict[name][: len(tensor)]), name


@EVERY_KIND
def test_the_pipeline_writes_from_the_folder(exports, kind) -> None:
    write = transformers.pipeline("text-generation", model=str(exports[kind]), device="cpu")
    [answer] = write("To be", max_new_tokens=5, do_sample=True)
    assert answer["generated_text"].startswith("To be")
    # Rows without a token are gone: nothing could sample one.
    assert write.model.config.vocab_size == len(write.tokenizer)


@EVERY_KIND
def test_a_prompt_of_any_ids_is_read_whole(exports, kind) -> None:
    # The first character of an alphabet, often the line end, once stood in for padding, so that
    # transformers looked past every one of them in a prompt.
    model = transformers.GPT2LMHeadModel.from_pretrained(exports[kind], local_files_only=True)
    ours = read_hf(exports[kind]).build_model()
    ids = [0, 3, 0, 5, 0, 0, 7]
    written = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0].tolist()
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(ours(torch.tensor([ids]))[0, -1].argmax()))
    assert written == ids


@EVERY_KIND
def test_what_goes_out_comes_back_bit_for_bit(exports, kind) -> None:
    before = parts(TOKENIZERS[kind], ROWS[kind])
    after = read_hf(exports[kind])
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    for name, tensor in after.state_dict.items():
        # A row may have been added for the end of a text.
        kept = before.state_dict[name]
        assert torch.equal(tensor[: len(kept)], kept[: len(tensor)]), name


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_a_bpe_comes_from_its_own_files_too(exports, tmp_path, kind) -> None:
    shutil.copytree(exports[kind], tmp_path / "theirs")
    (tmp_path / "theirs" / hf.NATIVE_TOKENIZER).unlink()
    wanted = TOKENIZERS[kind].to_json()
    assert read_hf(tmp_path / "theirs").tokenizer.to_json() == wanted
    made = tokenizer_json(TOKENIZERS[kind])["model"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in made["merges"])]
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    (tmp_path / "theirs" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    assert read_hf(tmp_path / "theirs").tokenizer.to_json() == wanted
    (tmp_path / "theirs" / "merges.txt").unlink()
    with pytest.raises(UserError, match="give --tokenizer"):
        read_hf(tmp_path / "theirs")


def test_a_tokenizer_that_splits_otherwise_is_not_taken_for_ours(exports, tmp_path) -> None:
    # Its merges alone would give other ids for the same text, and nobody would notice.
    shutil.copytree(exports["bpe"], tmp_path / "theirs")
    (tmp_path / "theirs" / hf.NATIVE_TOKENIZER).unlink()
    path = tmp_path / "theirs" / "tokenizer.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match="give another with --tokenizer"):
        read_hf(tmp_path / "theirs")


def test_a_model_that_transformers_saved_gives_its_logits(tmp_path) -> None:
    # As old checkpoints on the Hub have it: no prefix, masks among the weights, half precision.
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=16, n_embd=32, n_layer=2, n_head=2, n_inner=64
    )
    peer = transformers.GPT2LMHeadModel(config).eval()
    peer.transformer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        ours = read_hf(tmp_path, tokenizer=from_name("byte", "")).build_model()(ids)
        torch.testing.assert_close(ours, peer(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("activation_function", "relu", "activation_function is 'relu'"),
        ("model_type", "llama", "model_type"),
        ("n_embd", 40, "'transformer.wte.weight' has shape (257, 32)"),
        ("n_layer", 3, "'transformer.h.2.ln_1.weight' is missing"),
        ("n_layer", 1, "no tensor 'transformer.h.1"),
        ("n_positions", 10**9, "describes"),
        ("n_layer", "two", "not a GPT-2's configuration"),
    ],
)
def test_what_does_not_fit_is_named(exports, tmp_path, setting, value, words) -> None:
    shutil.copytree(exports["byte"], tmp_path / "odd")
    facts = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps(facts | {setting: value}))
    with pytest.raises(UserError) as refused:
        read_hf(tmp_path / "odd")
    assert words in str(refused.value)


def test_an_export_that_differs_is_refused_and_not_kept(config, tmp_path, monkeypatch) -> None:
    build(config).fit()
    # Somebody forgets to turn a matrix: square ones load without complaint.
    monkeypatch.setattr(hf, "TRANSPOSED", hf.TRANSPOSED[:1] + hf.TRANSPOSED[2:])
    with pytest.raises(RunError, match="logits differ by"):
        export_hf(config.out_dir, tmp_path / "out", log=lambda _: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left")]
)
def test_a_full_disk_is_one_line_and_nothing_half_written_is_kept(
    config, program, tmp_path, monkeypatch, error
) -> None:
    def fill_up(path, tensors, **more):
        path.write_bytes(b"half")
        raise error

    build(config).fit()
    monkeypatch.setattr(hf, "write_tensors", fill_up)
    done = program("export", config.out_dir, "--to", "hf", "out/model")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert done.err.startswith("error: out/model could not be written (")
    assert "No space left" in done.err
    assert "nothing of it is kept" in done.err
    assert not (tmp_path / "out").exists()


def test_a_run_goes_out_with_its_figures_and_a_new_one_starts_from_it(
    config, tmp_path, program, play
) -> None:
    build(config).fit()
    done = program("export", config.out_dir, "--to", "hf", "out")
    assert (done.code, done.out) == (0, ""), done.err
    assert "differ from ours by" in done.err
    card = Path("out/README.md").read_text(encoding="utf-8")
    # The best checkpoint's own figures.
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    best = min((e for e in events if e["event"] == "eval"), key=lambda e: e["val_loss"])
    assert f"{best['val_loss']:.4f} nats" in card
    assert "play.txt" in card
    # There is no c in the play.
    assert "Once" not in card
    assert Path("out/training_curves.png").is_file()

    again = program("export", config.out_dir, "--to", "hf", "out")
    assert (again.code, "there already" in again.err) == (2, True)

    ours, theirs = load(config.out_dir, device="cpu"), load("out", device="cpu")
    assert theirs.generate("ROMEO:", 20, seed=1) == ours.generate("ROMEO:", 20, seed=1)
    assert program("import", "out", "back").code == 0
    assert load("back", device="cpu").generate("J", 9, seed=1) == ours.generate("J", 9, seed=1)
    assert program("eval", "back", "--data", play, "--device", "cpu").code == 0

    small = ("--preset", "debug", "--device", "cpu", "--input", play, "--max_steps", 2)
    first = []
    for source in ("out", "back"):
        done = program(*small, "--init_from", source, "--out_dir", f"from-{source}")
        assert done.code == 0, done.err
        first.append(next(line for line in done.out.splitlines() if line.startswith("step 0")))
    assert len({line.split("dt")[0] for line in first}) == 1
    # The import made for it is found again.
    said: list[str] = []
    assert import_if_needed("out", log=said.append) == "runs/imported/out"
    assert ["imported before" in text for text in said] == [True]


def test_a_model_that_was_replaced_is_imported_anew(exports, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, other, *_ = exports.values()
    said: list[str] = []
    shutil.copytree(one, "mine")
    first = import_if_needed("mine", log=said.append)
    # The same, copied anew, is the same still.
    shutil.rmtree("mine")
    shutil.copytree(one, "mine")
    assert import_if_needed("mine", log=said.append) == first
    assert "imported before" in said[-1]
    shutil.rmtree("mine")
    shutil.copytree(other, "mine")
    assert import_if_needed("mine", log=said.append) == first
    assert "came from another mine: moved to" in said[-2]
    assert {path.name for path in Path("runs/imported").iterdir()} == {"mine", "mine.old-1"}
    sizes = [load(path, device="cpu").tokenizer.vocab_size for path in (first, f"{first}.old-1")]
    assert sizes == [read_hf(path).tokenizer.vocab_size for path in (other, one)]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_an_import_that_was_damaged_is_made_again(exports, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    shutil.copytree(next(iter(exports.values())), "mine")
    path = Path(import_if_needed("mine", log=said.append))
    os.truncate(path / name, (path / name).stat().st_size - 5)
    assert import_if_needed("mine", log=said.append) == path.as_posix()
    assert "runs/imported/mine is damaged" in said[-2]
    assert find_corruption(path, INFERENCE_FILES) is None


@pytest.mark.parametrize("source", ["runs/nao", "model/ckpt.pt", "ckpt.pth", "out/", "~/model"])
def test_a_mistyped_path_is_called_missing_and_not_looked_for_elsewhere(program, source) -> None:
    # It was once asked for on the Hub, and the answer was about the network.
    Path("runs").mkdir()
    for command in (("import", source, "o"), ("--init_from", source, "--preset", "debug")):
        done = program(*command)
        assert (done.code, f"{source} does not exist" in done.err) == (2, True), done.err
        assert "fetching" not in done.err + done.out


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("m.gguf", "GGUF is not read"),
        ("model.safetensors", "give the folder that it lies in"),
        ("run", "--init_from take it as it is"),
    ],
)
def test_what_is_imported_some_other_way_is_told_apart(config, program, source, words) -> None:
    build(config).fit()
    for name in ("m.gguf", "model.safetensors"):
        Path(name).write_bytes(b"something")
    done = program("import", source, "o")
    assert (done.code, words in done.err) == (2, True), done.err


@pytest.mark.parametrize("option", [("--type", "q8_0"), ("--private", "true")])
def test_an_option_of_another_form_is_not_ignored(program, option) -> None:
    done = program("export", "run", "out", "--to", "hf", *option)
    assert (done.code, f"{option[0]} " in done.err, "goes with" in done.err) == (2, True, True)


def test_a_card_begins_with_letters_that_the_model_knows() -> None:
    assert example_prompt(from_name("char", "Once")) == '"Once"'
    assert example_prompt(from_name("char", "\n 日本")) == '"日"'
    assert example_prompt(from_name("char", '"')) == r'"\""'
    assert example_prompt(from_name("gpt2", "")) == '"Once"'


def test_a_folder_that_is_no_model_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("empty", "no/such/model", "../nowhere"):
        with pytest.raises(UserError):
            import_model(str(tmp_path / source), tmp_path / "o", log=lambda _: None)


def test_a_model_of_ours_is_not_imported_but_said_to_be_ready(program, play) -> None:
    small = ("--preset", "debug", "--device", "cpu", "--max_steps", 2, "--out_dir", "run")
    assert program(*small, "--input", play).code == 0
    for source in ("run", "run/checkpoints/last"):
        done = program("import", source, "again")
        assert done.code == 2
        assert f"{source} is a model of this program already: sample, eval, export" in done.err


def test_several_starts_from_one_model_make_one_import(exports, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exports["char"], "theirs")
    said: list[str] = []

    def start_all() -> set[str]:
        with ThreadPoolExecutor(6) as pool:
            return set(pool.map(lambda _: import_if_needed("theirs", log=said.append), range(6)))

    assert start_all() == {"runs/imported/theirs"}
    assert sum("1 layers" in line or "2 layers" in line for line in said) == 1
    # The model changes: it is imported once more, and one old import is kept.
    config = Path("theirs/config.json")
    config.write_text(config.read_text() + " ")
    assert start_all() == {"runs/imported/theirs"}
    assert sorted(path.name for path in Path("runs/imported").iterdir()) == [
        "theirs",
        "theirs.old-1",
    ]
    assert load("runs/imported/theirs", device="cpu").generate_batch("To", 2)


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "gptforge_tokenizer.json"])
def test_a_pipe_or_a_device_in_a_model_to_import_is_refused_at_once(
    exports, tmp_path, name
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(exports["char"], folder)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(UserError, match="theirs"):
            import_model(str(folder), tmp_path / "out", log=lambda _: None)
    os.mkfifo(tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt is a named pipe"):
        import_model(str(tmp_path / "ckpt.pt"), tmp_path / "out", log=lambda _: None)


def test_weights_of_a_size_that_the_shape_does_not_explain_are_not_read(exports, tmp_path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(exports["char"], folder)
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes, more than any"):
        read_hf(folder)


@pytest.mark.skipif(os.name == "nt", reason="needs a umask")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_is_made_as_the_umask_says(config, program, tmp_path, mask, play) -> None:
    before = os.umask(mask)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "made" / "cache"))
            run = str(tmp_path / "made" / "run")
            build(dataclasses.replace(config, max_steps=2, warmup_steps=1, out_dir=run)).fit()
        for form in ("hf", "space", "gguf"):
            assert program("export", run, "--to", form, f"made/{form}").code == 0
        assert program("import", "made/hf", "made/import").code == 0
        prepared = ("prepare", play, "--out", "made/shards", "--tokenizer", "made/own.json")
        assert (
            program("tokenizer", "train", play, "--vocab_size", 300, "--out", prepared[-1]).code
            == 0
        )
        assert program(*prepared).code == 0
    finally:
        os.umask(before)
    odd = {
        path.relative_to(tmp_path).as_posix(): oct(path.stat().st_mode & 0o777)
        for path in (tmp_path / "made").rglob("*")
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert odd == {}


def test_a_killed_export_leaves_nothing_that_the_next_one_does_not_delete(
    config, tmp_path, monkeypatch, program
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    build(config).fit()
    with monkeypatch.context() as patch:
        # As if the process were gone: nobody cleans up.
        patch.setattr(hf, "hf_tokenizer", die)
        patch.setattr(files, "remove", lambda path: None)
        with pytest.raises(Killed):
            export_hf(config.out_dir, tmp_path / "out", log=lambda _: None)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "new" / "model.safetensors").exists()
    assert program("export", config.out_dir, "--to", "hf", "out").code == 0
    assert not (tmp_path / ".out.partial").exists()
