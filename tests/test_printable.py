"""Untrusted text neither controls a terminal nor becomes Markdown."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import gptforge
from gptforge.checkpoint import format as checkpoints
from gptforge.cli import main
from gptforge.config import Config, GPTConfig
from gptforge.convert.bundle import ModelBundle
from gptforge.convert.model_card import Origin, model_card
from gptforge.errors import RunError, UserError
from gptforge.model import GPT
from gptforge.printable import (
    MAX_LINE,
    code_span,
    escape_markdown,
    printable,
    printable_text,
    short_repr,
)
from gptforge.report.console import Console
from gptforge.report.metrics import History
from gptforge.report.run_report import RunReport
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer

ESCAPES = "\x1b]0;owned\x07 \x9b2J \u202egpj.exe \r"
ESCAPED = r"\x1b]0;owned\x07 \x9b2J \u202egpj.exe \r"


def test_control_characters_are_escaped_as_in_a_python_string() -> None:
    assert printable(ESCAPES) == ESCAPED
    assert printable("a\n  b\tc\0\udcff\u2028") == r"a b\tc\x00\udcff\u2028"
    assert printable_text("a\n\tb\x1b") == "a\n\tb\\x1b"


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語", "👩\u200d🚀", "\u0645\u06cc\u200c\u062e", r"C:\x1b"]
)
def test_letters_of_any_script_are_kept(text) -> None:
    assert printable(text) == printable_text(text) == text


def test_long_line_is_cut_in_the_middle() -> None:
    line = printable("a.json: bad key " + "x" * 40_000_000 + ": fix it")
    assert len(line) <= MAX_LINE and line.startswith("a.json: bad") and line.endswith(": fix it")
    assert len(printable("\x1b" * 10_000)) <= MAX_LINE
    assert printable(printable(line)) == line


@pytest.mark.parametrize("kind", [UserError, RunError])
def test_error_is_one_bounded_line(kind) -> None:
    message = str(kind(f"no tensor '{ESCAPES}{'y' * 10_000}'"))
    assert message.startswith(f"no tensor '{ESCAPED}") and len(message) <= MAX_LINE


def test_value_of_any_size_has_a_short_repr() -> None:
    assert short_repr({"a": 1}) == "{'a': 1}"
    assert short_repr(16**10_000) == "a value of type int that is too long to show"
    assert len(short_repr("x" * 10**6)) < 300


def test_escaped_markdown_is_shown_literally() -> None:
    assert escape_markdown("a_b *c* [x](y) <b> | `d` # ~") == (
        r"a\_b \*c\* \[x\](y) \<b\> \| \`d\` \# \~"
    )
    assert escape_markdown("a\n# b") == r"a \# b"
    assert code_span("a") == "`a`" and code_span("a ``b``") == "``` a ``b`` ```"


def test_model_card_escapes_the_name_of_the_text() -> None:
    config = Config(input="x|![a](http:)<img src=x>\n# y.txt")
    card = model_card(
        ModelBundle(GPTConfig(8, 64, 1, 2, 8), {}, ByteTokenizer()),
        Origin(config, 3, History(), None),
        title="<script>",
    )
    assert r"| Training text | x\|!\[a\](http:)\<img src=x\> \# y.txt |" in card
    assert "\n# \\<script\\>\n" in card


def test_log_and_samples_are_printable(tmp_path) -> None:
    report = RunReport(Config(out_dir=str(tmp_path), max_steps=9), title=f"debug on {ESCAPES}*.txt")
    report.start("summary", {"command": "gpt.py --input `x`"})
    report.log_sample(3, f"To be{ESCAPES}", is_last=False)
    log, samples = (tmp_path / "log.md").read_text(), (tmp_path / "samples.md").read_text()
    assert "Made by `` gpt.py --input `x` ``." in log
    assert r"\*.txt" in log and f"To be{ESCAPED}" in samples
    assert "\x1b" not in log + samples


def test_console_escapes_generated_text(capsys) -> None:
    Console().log(f"Sample:\n\t{ESCAPES}")
    assert capsys.readouterr().out == f"Sample:\n\t{ESCAPED}\n"


@pytest.fixture
def bell_model(tmp_path: Path) -> Path:
    """A model that generates only BEL."""
    config = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    weights = {
        n: torch.zeros_like(t) for n, t in model.state_dict().items() if n != "lm_head.weight"
    }
    weights["transformer.ln_f.bias"][0] = 1
    weights["transformer.wte.weight"][0, 0] = 9
    shape = {**vars(config), "context_length": 8, "tokenizer": "char"}
    text = "".join(f"{n} = {json.dumps(v)}\n" for n, v in shape.items())
    folder = tmp_path / "bell_model"
    folder.mkdir()
    checkpoints.save_checkpoint(
        folder, {checkpoints.MODEL: weights}, tokenizer=CharTokenizer("\x07a"), config=text
    )
    assert gptforge.load(folder).generate("a", 3, temperature=0) == "\x07\x07\x07"
    return folder


def test_pipe_gets_generated_text_unchanged(bell_model, capsys) -> None:
    flags = ["--prompt", "a", "--max_new_tokens", "3", "--temperature", "0"]
    assert main(["sample", str(bell_model), *flags]) == 0
    assert capsys.readouterr().out == "a\x07\x07\x07\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("more", [[], ["--num_samples", "2"], ["--json"]])
def test_terminal_gets_no_control_character(bell_model, monkeypatch, more) -> None:
    import pty

    parent, child = pty.openpty()
    flags = ["--prompt", "a", "--max_new_tokens", "3", "--temperature", "0", *more]
    with monkeypatch.context() as patch, os.fdopen(child, "w") as terminal:
        patch.setattr(sys, "stdout", terminal)
        assert main(["sample", str(bell_model), *flags]) == 0
    output = b""
    with contextlib.suppress(OSError):  # how Linux reports the end
        while part := os.read(parent, 10_000):
            output += part
    os.close(parent)
    assert b"\x07" not in output
    assert (rb"\u0007" if "--json" in more else rb"a\x07\x07\x07") in output


def test_long_tensor_name_is_shortened(bell_model, program) -> None:
    from safetensors.torch import load_file, save_file

    from gptforge import files

    path = bell_model / "model.safetensors"
    save_file({**load_file(path), f"\x1b[2J{'x' * 50_000}": torch.zeros(1)}, path)
    manifest = json.loads((bell_model / "manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    (bell_model / "manifest.json").write_text(json.dumps(manifest))
    done = program("sample", bell_model)
    assert done.code == 2 and r"no tensor '\x1b[2Jxxx" in done.err
    assert len(done.err) < MAX_LINE and len(done.err.splitlines()) == 1 and "\x1b" not in done.err


@pytest.mark.parametrize("command", ["doctor", "prepare", "plan"])
def test_file_names_and_keys_are_escaped(program, command) -> None:
    name = "\x1b[31mred\x07.jsonl"
    Path(name).write_text(json.dumps({"\x1b]0;t\x07": "x"}) + "\n")
    args = {
        "doctor": [name],
        "prepare": [name, "--out", "o"],
        "plan": ["--input", name, "--preset", "debug"],
    }
    done = program(command, *args[command])
    assert done.code and r"\x1b[31mred\x07.jsonl" in done.out + done.err
    assert r"\x1b]0;t\x07" in done.out + done.err
    assert not set("\x1b\x07") & set(done.out + done.err)
