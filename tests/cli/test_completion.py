"""`gptforge completion`: what the shells offer, asked of the shells themselves."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from gptforge import cli
from gptforge.config import FIELDS
from gptforge.presets import PRESETS

# Words before and at the cursor -> words that are offered.
CASES = {
    "gptforge s": {"sample", "sweep"},
    "gptforge compl": {"completion"},
    "gptforge export run out --to ": {"hf", "gguf", "space"},
    "gptforge sample run --max_": {"--max_new_tokens"},
    "gptforge --max_": {"--max_lr", "--max_steps"},
    "gptforge plan --sched": {"--schedule"},
    "gptforge --preset ": set(PRESETS),
    "gptforge --shuffle f": {"false"},
    "gptforge tokenizer t": {"train"},
    "gptforge sample mo": {"model.gguf"},
    "gptforge --input mo": {"model.gguf"},
}


@pytest.fixture
def script(capsys):
    def script(shell: str) -> str:
        assert cli.main(["completion", shell]) == 0
        return capsys.readouterr().out

    return script


def run(*command: str, cwd: Path) -> set[str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=120)
    return {line.partition("\t")[0].strip() for line in done.stdout.splitlines()}


@pytest.mark.parametrize("line", CASES)
def test_bash_completes(script, tmp_path, line) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    (tmp_path / "model.gguf").touch()
    words = line.split(" ")
    # `compopt` and the default, the names of files, only work for a real Tab key.
    call = (
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _gptforge; "
        f'[[ $COMPREPLY ]] || COMPREPLY=($(compgen -f -- "${{COMP_WORDS[-1]}}")); '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert run(bash, "-c", f"{script('bash')}\n{call}", cwd=tmp_path) == CASES[line]


@pytest.mark.parametrize("line", CASES)
def test_fish_completes(script, tmp_path, line) -> None:
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("fish is not installed")
    (tmp_path / "model.gguf").touch()
    (tmp_path / "_.fish").write_text(script("fish"))
    offered = run(fish, "-c", f"source _.fish; complete -C {shlex.quote(line)}", cwd=tmp_path)
    assert offered == CASES[line]


def test_all_flags_are_offered(script) -> None:
    for shell in ("bash", "zsh"):
        text = script(shell)
        assert all(f"--{name} " in text for name in FIELDS)
    assert all(f" -l {name} " in script("fish") for name in FIELDS)
