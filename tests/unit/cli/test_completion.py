"""TAB in real shells, by the script that `--show-completion` prints in each; one that is not installed is skipped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llava_convert

ROOT = Path(llava_convert.__file__).resolve().parents[1]
TARGETS = {"pth", "xtuner", "official", "hf", "peft", "gguf"}
CASES = [
    (["pth", "x", "--to", ""], TARGETS),
    (["hf", "x", "--to", "g"], {"gguf"}),
    (["pth", "x", "--dtype", "b"], {"bfloat16"}),
    (["pth", "x", "--part", ""], {"all", "llm", "projector", "visual-encoder"}),
    (["hf", "x", "--outtype", "q4"], {"q4_k_m", "q4_0"}),
    (["upload", "x", "me/y", "--verify", ""], {"full", "off"}),
    (["up"], {"upload"}),
]


def environment(**more: str) -> dict[str, str]:
    """With this command, as this checkout has it, first on the PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | more


def in_shell(*command: str, **more: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("words", "offered"), CASES)
def test_bash(words: list[str], offered: set[str]) -> None:
    line = ["llava-convert", *words]
    script = f"""
eval "$(llava-convert --show-completion)"
COMP_WORDS=({" ".join(f"'{word}'" for word in line)}) COMP_CWORD={len(words)}
_llava_convert_completion llava-convert
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    assert set(in_shell("bash", "-c", script).split()) == offered


@pytest.mark.parametrize(("words", "offered"), CASES)
def test_fish(words: list[str], offered: set[str]) -> None:
    line = " ".join(["llava-convert", *words])
    script = f'llava-convert --show-completion | source; complete --do-complete "{line}"'
    told = in_shell("fish", "--no-config", "-c", script).splitlines()
    assert {text.split("\t")[0] for text in told if text} == offered  # a description stands behind a tab


# A shell as someone types in it says what it completes.
INSTALLED = {
    "bash": (("bash", "-i", "-c", "complete -p llava-convert"), "_llava_convert_completion"),
    "zsh": (("zsh", "-i", "-c", "print $_comps[llava-convert]"), "_llava-convert"),
    "fish": (("fish", "-c", 'complete --do-complete "llava-convert hf x --to g"'), "gguf"),
}


@pytest.mark.parametrize("shell", INSTALLED)
def test_it_is_installed_for_the_next_shell(shell: str, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / ".config")}
    # The command sees which shell has called it: one that waits for it, since more follows.
    in_shell(shell, "-c", "llava-convert --install-completion; true", **home)
    asked, told = INSTALLED[shell]
    assert told in in_shell(*asked, **home)


# A pseudo terminal of zsh's own, since its completion runs in the line editor alone; a key shows what is offered.
ZSH = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'PS1=; unsetopt zle_bracketed_paste; autoload -Uz compinit; compinit -u -D; LISTMAX=10000'
zpty -w shell 'eval "$(llava-convert --show-completion)"; zstyle ":completion:*" list-colors ""'
zpty -w shell 'bindkey "^X" list-choices; print READY''"_""NOW"'
zpty -r shell seen '*READY_NOW*'
zpty -w -n shell $'@LINE@\x18'
sleep 4
zpty -w -n shell $'\x15print DONE""_NOW\n'
zpty -r shell seen '*DONE_NOW*'
print -r -- $seen
"""


@pytest.mark.slow
@pytest.mark.parametrize(("words", "offered"), CASES)
def test_zsh(words: list[str], offered: set[str]) -> None:
    printed = in_shell("zsh", "-f", "-c", ZSH.replace("@LINE@", " ".join(["llava-convert", *words])))
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", " ", printed)
    after = seen.partition("llava-convert")[2].split()
    assert offered <= set(after), seen
    others = {word for _, every in CASES for word in every} - offered - set(words)
    assert not others & set(after), seen
