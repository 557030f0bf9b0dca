"""Export to transformers and import from it, without a network."""

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
from gptforge.checkpoint.format import INFERENCE_FILES, find_corruption
from gptforge.config import GPTConfig
from gptforge.convert import hf
from gptforge.convert.bundle import MAX_LOGIT_DIFFERENCE, ModelBundle
from gptforge.convert.hf import check_hf, read_hf, write_hf
from gptforge.convert.hf_tokenizer import tokenizer_json
from gptforge.convert.model_card import example_prompt
from gptforge.errors import RunError, UserError
from gptforge.model import GPT
from gptforge.tokenizers import from_name
from tests.convert.kinds import ROWS, TEXTS, TOKENIZERS

ALL_TOKENIZERS = pytest.mark.parametrize("kind", TOKENIZERS)


def make_bundle(tokenizer, vocab_size: int) -> ModelBundle:
    config = GPTConfig(block_size=24, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    tensors = {name: t.detach() for name, t in model.state_dict().items() if "lm_head" not in name}
    return ModelBundle(config, tensors, tokenizer)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for kind, tokenizer in TOKENIZERS.items():
        folders[kind] = tmp_path_factory.mktemp(kind.split()[0])
        bundle = make_bundle(tokenizer, ROWS[kind])
        write_hf(folders[kind], bundle, card="# A model\n")
        assert check_hf(folders[kind], bundle) <= MAX_LOGIT_DIFFERENCE
    return folders


@ALL_TOKENIZERS
def test_transformers_loads_the_same_tokenizer(exports, kind) -> None:
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(exports[kind], local_files_only=True)
    tokenizer = TOKENIZERS[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert hf_tokenizer.encode(text, add_special_tokens=False) == ids
        assert hf_tokenizer.decode(ids) == text
    assert len(hf_tokenizer) == tokenizer.vocab_size + (tokenizer.eot_token is None)


@ALL_TOKENIZERS
def test_every_file_has_the_end_of_text_id(exports, kind) -> None:
    tokenizer = TOKENIZERS[kind]
    eos_id = tokenizer.vocab_size if tokenizer.eot_token is None else tokenizer.eot_token
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(exports[kind], local_files_only=True)
    for name in ("bos", "eos", "unk", "pad"):
        assert getattr(hf_tokenizer, f"{name}_token") == "<|endoftext|>"
        assert getattr(hf_tokenizer, f"{name}_token_id") == eos_id
    for file in ("config.json", "generation_config.json"):
        record = json.loads((exports[kind] / file).read_text())
        assert [record[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [eos_id] * 3
    assert json.loads((exports[kind] / "config.json").read_text())["vocab_size"] == len(
        hf_tokenizer
    )


def test_tensors_have_openais_names_and_none_is_missing(exports) -> None:
    with safe_open(exports["char"] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"wte.weight", "wpe.weight", "h.0.ln_1.weight", "ln_f.bias"} <= names
    assert not any(name.startswith(("transformer.", "lm_head.")) for name in names)
    model, loading_info = transformers.GPT2LMHeadModel.from_pretrained(
        exports["char"], local_files_only=True, output_loading_info=True
    )
    assert {key: list(names) for key, names in loading_info.items() if names} == {}
    assert model.lm_head.weight is model.transformer.wte.weight


def test_an_export_of_an_earlier_version_can_be_imported(exports, tmp_path) -> None:
    # Names began with `transformer.`, and there was no end-of-text id.
    shutil.copytree(exports["char"], tmp_path / "old")
    path, size = tmp_path / "old/model.safetensors", TOKENIZERS["char"].vocab_size
    tensors = {f"transformer.{name}": tensor for name, tensor in load_file(path).items()}
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:size].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    hf_config = json.loads((tmp_path / "old/config.json").read_text())
    hf_config |= {"vocab_size": size, "bos_token_id": None, "eos_token_id": None}
    (tmp_path / "old/config.json").write_text(json.dumps(hf_config))
    old, new = read_hf(tmp_path / "old"), read_hf(exports["char"])
    for name, tensor in old.state_dict.items():
        assert torch.equal(tensor, new.state_dict[name][: len(tensor)]), name


@ALL_TOKENIZERS
def test_the_text_generation_pipeline_loads_an_export(exports, kind) -> None:
    pipeline = transformers.pipeline("text-generation", model=str(exports[kind]), device="cpu")
    [output] = pipeline("To be", max_new_tokens=5, do_sample=True)
    assert output["generated_text"].startswith("To be")
    # There are no padding rows, which could be sampled.
    assert pipeline.model.config.vocab_size == len(pipeline.tokenizer)


@ALL_TOKENIZERS
def test_no_id_of_a_prompt_is_taken_for_padding(exports, kind) -> None:
    # Regression: id 0, often the line break, was the padding token, and was masked in prompts.
    model = transformers.GPT2LMHeadModel.from_pretrained(exports[kind], local_files_only=True)
    our_model = read_hf(exports[kind]).build_model()
    ids = [0, 3, 0, 5, 0, 0, 7]
    generated = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0].tolist()
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(our_model(torch.tensor([ids]))[0, -1].argmax()))
    assert generated == ids


@ALL_TOKENIZERS
def test_export_and_import_keep_all_bits(exports, kind) -> None:
    before = make_bundle(TOKENIZERS[kind], ROWS[kind])
    after = read_hf(exports[kind])
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    for name, tensor in after.state_dict.items():
        # A row may have been appended for the end-of-text token.
        expected = before.state_dict[name]
        assert torch.equal(tensor[: len(expected)], expected[: len(tensor)]), name


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_a_bpe_is_read_from_hugging_face_files(exports, tmp_path, kind) -> None:
    shutil.copytree(exports[kind], tmp_path / "hf")
    (tmp_path / "hf" / hf.NATIVE_TOKENIZER).unlink()
    expected = TOKENIZERS[kind].to_json()
    assert read_hf(tmp_path / "hf").tokenizer.to_json() == expected
    merges = tokenizer_json(TOKENIZERS[kind])["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (tmp_path / "hf" / "tokenizer.json").unlink()
    (tmp_path / "hf" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    assert read_hf(tmp_path / "hf").tokenizer.to_json() == expected
    (tmp_path / "hf" / "merges.txt").unlink()
    with pytest.raises(UserError, match="give --tokenizer"):
        read_hf(tmp_path / "hf")


def test_a_tokenizer_with_another_pre_tokenizer_is_refused(exports, tmp_path) -> None:
    # The merges alone would silently give other ids for the same text.
    shutil.copytree(exports["bpe"], tmp_path / "hf")
    (tmp_path / "hf" / hf.NATIVE_TOKENIZER).unlink()
    path = tmp_path / "hf" / "tokenizer.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match="give another with --tokenizer"):
        read_hf(tmp_path / "hf")


def test_a_model_saved_by_transformers_has_the_same_logits(tmp_path) -> None:
    # Old checkpoints on the Hub have no prefix, and masks among the weights.
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=16, n_embd=32, n_layer=2, n_head=2, n_inner=64
    )
    hf_model = transformers.GPT2LMHeadModel(config).eval()
    hf_model.transformer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        logits = read_hf(tmp_path, tokenizer=from_name("byte", "")).build_model()(ids)
        torch.testing.assert_close(logits, hf_model(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("activation_function", "relu", "activation_function is 'relu'"),
        ("model_type", "llama", "model_type"),
        ("n_embd", 40, "'transformer.wte.weight' has shape (257, 32)"),
        ("n_layer", 3, "'transformer.h.2.ln_1.weight' is missing"),
        ("n_layer", 1, "no tensor 'transformer.h.1"),
        ("n_positions", 10**9, "'transformer.wpe.weight' has shape ("),
        ("n_layer", "two", "not a GPT-2's configuration"),
    ],
)
def test_an_unsupported_configuration_is_named(exports, tmp_path, setting, value, words) -> None:
    shutil.copytree(exports["byte"], tmp_path / "odd")
    hf_config = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps(hf_config | {setting: value}))
    with pytest.raises(UserError) as refused:
        read_hf(tmp_path / "odd")
    assert words in str(refused.value)


def test_an_export_with_other_logits_is_not_kept(run, tmp_path, monkeypatch) -> None:
    # A matrix that is not transposed: a square one loads without an error.
    monkeypatch.setattr(hf, "TRANSPOSED", hf.TRANSPOSED[:1] + hf.TRANSPOSED[2:])
    with pytest.raises(RunError, match="logits differ by"):
        export_hf(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(28, "No space left"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    run, program, tmp_path, monkeypatch, error
) -> None:
    def fill_up(path, tensors, **more):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(hf, "save_safetensors", fill_up)
    done = program("export", run, "--to", "hf", "out/model")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert done.err.startswith("error: out/model could not be written (")
    assert "the disk is full" in done.err
    assert "nothing of it is kept" in done.err
    assert not (tmp_path / "out").exists()


def test_a_run_is_exported_imported_and_trained_further(
    run, tmp_path, program, play, messages
) -> None:
    done = program("export", run, "--to", "hf", "out")
    assert (done.code, done.out) == (0, ""), done.err
    assert "differ from ours by at most" in done.err
    card = Path("out/README.md").read_text(encoding="utf-8")
    # The metrics of the best checkpoint.
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    best = min((e for e in events if e["event"] == "eval"), key=lambda e: e["val_loss"])
    assert f"{best['val_loss']:.4f} nats per token, over {best['val_tokens']:,} tokens" in card
    assert "play.txt" in card
    # The play has no c.
    assert "Once" not in card
    assert Path("out/training_curves.png").is_file()

    again = program("export", run, "--to", "hf", "out")
    assert (again.code, "already exists" in again.err) == (2, True)

    model, exported = load(run, device="cpu"), load("out", device="cpu")
    assert exported.generate("ROMEO:", 20, seed=1) == model.generate("ROMEO:", 20, seed=1)
    assert program("import", "out", "back").code == 0
    assert load("back", device="cpu").generate("J", 9, seed=1) == model.generate("J", 9, seed=1)
    assert program("eval", "back", "--data", play, "--device", "cpu").code == 0

    small = ("--preset", "debug", "--device", "cpu", "--input", play, "--max_steps", 2)
    first = []
    for source in ("out", "back"):
        done = program(*small, "--init_from", source, "--out_dir", f"from-{source}")
        assert done.code == 0, done.err
        first.append(next(line for line in done.out.splitlines() if line.startswith("step 0")))
    assert len({line.split("dt")[0] for line in first}) == 1
    # The import is reused.
    assert import_if_needed("out") == "runs/imported/out"
    assert ["imported before" in text for text in messages] == [True]


def test_a_replaced_model_is_imported_again(exports, tmp_path, monkeypatch, messages) -> None:
    monkeypatch.chdir(tmp_path)
    one, other, *_ = exports.values()
    shutil.copytree(one, "mine")
    first = import_if_needed("mine")
    # A new copy of the same model is the same.
    shutil.rmtree("mine")
    shutil.copytree(one, "mine")
    assert import_if_needed("mine") == first
    assert "imported before" in messages[-1]
    shutil.rmtree("mine")
    shutil.copytree(other, "mine")
    assert import_if_needed("mine") == first
    assert "came from another mine: moved to" in messages[-2]
    assert {path.name for path in Path("runs/imported").iterdir()} == {"mine", "mine.old-1"}
    sizes = [load(path, device="cpu").tokenizer.vocab_size for path in (first, f"{first}.old-1")]
    assert sizes == [read_hf(path).tokenizer.vocab_size for path in (other, one)]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_a_damaged_import_is_made_again(exports, tmp_path, monkeypatch, name, messages) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(next(iter(exports.values())), "mine")
    path = Path(import_if_needed("mine"))
    os.truncate(path / name, (path / name).stat().st_size - 5)
    assert import_if_needed("mine") == path.as_posix()
    assert "runs/imported/mine is damaged" in messages[-2]
    assert find_corruption(path, INFERENCE_FILES) is None


@pytest.mark.parametrize("source", ["runs/nao", "model/ckpt.pt", "ckpt.pth", "out/", "~/model"])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(program, source) -> None:
    # Regression: the error was about the network.
    Path("runs").mkdir()
    for command in (("import", source, "o"), ("--init_from", source, "--preset", "debug")):
        done = program(*command)
        assert (done.code, f"{source} does not exist" in done.err) == (2, True), done.err
        assert "downloading" not in done.err + done.out


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("m.gguf", "GGUF is not read"),
        ("model.safetensors", "give the folder that it is in"),
        ("run", "--init_from take it as it is"),
    ],
)
def test_other_files_are_refused_with_a_hint(run, program, source, words) -> None:
    for name in ("m.gguf", "model.safetensors"):
        Path(name).write_bytes(b"something")
    done = program("import", source, "o")
    assert (done.code, words in done.err) == (2, True), done.err


@pytest.mark.parametrize("option", [("--type", "q8_0"), ("--private", "true")])
def test_an_option_of_another_format_is_refused(program, option) -> None:
    done = program("export", "run", "out", "--to", "hf", *option)
    assert (done.code, f"{option[0]} " in done.err, " needs --" in done.err) == (2, True, True)


def test_the_example_prompt_can_be_encoded() -> None:
    assert example_prompt(from_name("char", "Once")) == '"Once"'
    assert example_prompt(from_name("char", "\n 日本")) == '"日"'
    assert example_prompt(from_name("char", '"')) == r'"\""'
    assert example_prompt(from_name("gpt2", "")) == '"Once"'


def test_a_folder_that_is_not_a_model_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("empty", "no/such/model", "../nowhere"):
        with pytest.raises(UserError):
            import_model(str(tmp_path / source), tmp_path / "o")


def test_a_gptforge_model_needs_no_import(program, play) -> None:
    small = ("--preset", "debug", "--device", "cpu", "--max_steps", 2, "--out_dir", "run")
    assert program(*small, "--input", play).code == 0
    for source in ("run", "run/checkpoints/last"):
        done = program("import", source, "again")
        assert done.code == 2
        assert f"{source} is a model of this program already: sample, eval, export" in done.err


def test_concurrent_starts_from_one_model_import_it_once(
    exports, tmp_path, monkeypatch, messages
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exports["char"], "hf")

    def import_concurrently() -> set[str]:
        with ThreadPoolExecutor(6) as pool:
            return set(pool.map(lambda _: import_if_needed("hf"), range(6)))

    assert import_concurrently() == {"runs/imported/hf"}
    assert sum("1 layers" in line or "2 layers" in line for line in messages) == 1
    # When the model changes, it is imported again, and the old import is kept.
    config = Path("hf/config.json")
    config.write_text(config.read_text() + " ")
    assert import_concurrently() == {"runs/imported/hf"}
    assert sorted(path.name for path in Path("runs/imported").iterdir()) == [
        "hf",
        "hf.old-1",
    ]
    assert load("runs/imported/hf", device="cpu").generate_batch("To", 2)


@pytest.mark.parametrize("source", [".", "./", "../hf"])
def test_the_working_folder_is_imported_beside_other_imports(
    exports, tmp_path, monkeypatch, source
) -> None:
    # Regression: `.` was imported as runs/imported itself, which holds all imports.
    shutil.copytree(exports["char"], tmp_path / "hf")
    monkeypatch.chdir(tmp_path / "hf")
    assert import_if_needed(source) == "runs/imported/hf"


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "gptforge_tokenizer.json"])
def test_a_pipe_or_device_in_a_model_is_refused(exports, tmp_path, name) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exports["char"], folder)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(UserError, match="hf"):
            import_model(str(folder), tmp_path / "out")
    os.mkfifo(tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt is a named pipe"):
        import_model(str(tmp_path / "ckpt.pt"), tmp_path / "out")


def test_weights_too_large_for_the_configuration_are_not_read(exports, tmp_path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exports["char"], folder)
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes, more than any"):
        read_hf(folder)


def test_the_next_export_deletes_what_a_killed_one_left(
    run, tmp_path, monkeypatch, program
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        # As if the process were gone: nothing is cleaned up.
        patch.setattr(hf, "tokenizer_json", die)
        patch.setattr(files, "remove", lambda path: None)
        with pytest.raises(Killed):
            export_hf(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "new" / "model.safetensors").exists()
    assert program("export", run, "--to", "hf", "out").code == 0
    assert not (tmp_path / ".out.partial").exists()
