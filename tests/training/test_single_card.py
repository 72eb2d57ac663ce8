"""The single card's pair in miniature: the two published commands one after the other, on to GGUF and an answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fixtures.demo import runtimes
from tests.interop.peer_programs import PEERS
from tests.training.programs import environment

STAGE_1 = "llava_llama3_8b_instruct_quant_clip_vit_large_p14_336_e1_gpu1_pretrain"
STAGE_2 = "llava_llama3_8b_instruct_qlora_clip_vit_large_p14_336_e1_gpu1_finetune"
ROWS = 13  # of the first set: no multiple of what is accumulated


def tree(folder: Path) -> None:
    """Both of LLaVA's sets where the recipes look for them."""
    root = folder / "data/llava_data"

    def said(asked: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": asked}, {"from": "gpt", "value": "A blue thing."}]

    for picture in ("LLaVA-Pretrain/images/00453/1.jpg", "llava_images/gqa/images/1.jpg"):
        (root / picture).parent.mkdir(parents=True)
        Image.new("RGB", (64, 48), (90, 140, 200)).save(root / picture)
    captions = [{"id": str(n), "image": "00453/1.jpg", "conversations": said("<image>\nWhat?")} for n in range(ROWS)]
    mix = [{"id": "0", "image": "gqa/images/1.jpg", "conversations": said("<image>\nWhat?")}]
    mix += [{"id": str(n), "conversations": said("Hi")} for n in range(1, 6)]
    (root / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").write_text(json.dumps(captions))
    (root / "LLaVA-Instruct-150K").mkdir()
    (root / "LLaVA-Instruct-150K/llava_v1_5_mix665k.json").write_text(json.dumps(mix))


@pytest.mark.parametrize(
    ("peer", "options"),
    [
        ("", ["--seed", "1024"]),
        pytest.param("deepspeed", ["--deepspeed", "deepspeed_zero2", "--seed", "1024"], marks=pytest.mark.peers),
    ],
)
def test_one_command_after_the_other(tiny: Path, tmp_path: Path, peer: str, options: list[str]) -> None:
    """With the models' sizes and the accumulation changed, and nothing else: stage 2 finds what stage 1 left.

    DeepSpeed 0.14.4 trains no 4-bit weights on a CPU, so it has the base in float32.
    """
    tree(tmp_path)
    python = str(PEERS / peer / "bin/python") if peer else sys.executable
    if not Path(python).is_file():
        pytest.skip(f"no environment {peer}: `make peers` builds it")
    more = {"TORCH_EXTENSIONS_DIR": str(PEERS / peer / "extensions")} if peer else {}
    small = [
        f"model.llm={tiny / 'llm'}", f"model.visual_encoder={tiny / 'vit'}", "model.llm_dtype=fp32", "train.dtype=fp32",
        "data.max_length=200", "train.accumulate=5", *(["model.quantization="] if peer else []),
    ]  # fmt: skip

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "llava_convert", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment(**more), capture_output=True, text=True)

    for recipe, last in ((STAGE_1, ROWS), (STAGE_2, 10)):
        words = ["train", recipe, *options, *(word for change in small for word in ("--set", change))]
        if recipe == STAGE_2:
            dry = run(*words, "--dry-run")
            assert f"starts from: work_dirs/{STAGE_1}/iter_{ROWS}.pth: 4 tensors of projector" in dry.stdout, dry.stderr
        done = run(*words)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"work_dirs/{recipe}/iter_{last}.pth").exists()
    done = run("convert", f"work_dirs/{STAGE_2}", "--to", "gguf", "-o", "out", "--name", "pair", "--outtype", "f16")
    assert done.returncode == 0, done.stderr
    ask = runtimes.llama_cpp(tmp_path / "out/pair-f16.gguf", tmp_path / "out/pair-mmproj-f16.gguf")
    (answer,) = ask([Image.open(tiny / "picture.png")], "What is it?")
    assert answer


def test_the_second_before_the_first(tmp_path: Path) -> None:
    """Neither base models nor data are here: a dry run says so of each, and what comes first; a run refuses."""
    words = [sys.executable, "-m", "llava_convert", "train", STAGE_2]
    dry = subprocess.run([*words, "--dry-run"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    lines = [line for line in dry.stdout.splitlines() if line.startswith("missing: ")]
    assert len(lines) == 2 and "llava_v1_5_mix665k.json: no such data file" in lines[0]
    assert f"llava-convert train {STAGE_1}" in lines[1]
    assert "llm: 8,198,033,408 parameters, 167,772,160 trained" in dry.stdout
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 3 and f"first: llava-convert train {STAGE_1}" in done.stderr
    assert list(tmp_path.iterdir()) == []
