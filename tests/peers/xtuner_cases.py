"""Train tiny LLaVA models with the real xtuner 0.1.23 and convert them with its pth_to_hf: more cases like the golden.

Run with the environment's Python: `.venvs/xtuner/bin/python tests/peers/xtuner_cases.py [OUT]`. Training goes through
the main function behind `xtuner train` and conversion through that of `xtuner convert pth_to_hf`, each in a forked
child, so that the seconds of imports are paid once and nothing one run patches reaches the next. Two things are not
stock: LoRA B starts at random values instead of zero (a merge that does nothing would go unseen), and the LLM built in
bfloat16 trains under a CPU autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

# Read by torch.load: xtuner 0.1.23 predates torch 2.6's refusal of pickles that hold more than tensors.
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from peft.tuners.lora.layer import LoraLayer
from tiny_models import Base, write_base
from xtuner.tools import train
from xtuner.tools.model_converters import pth_to_hf

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG = Template(Path(__file__).with_name("xtuner_config.txt").read_text())
FORMATS = ("xtuner", "official", "huggingface")

BASES: dict[str, Base] = {
    "plain": Base(),
    "tied": Base(tied=True),
    "tokens500": Base(tokens=500),
    "tokens510": Base(tokens=510),
    "tokens511": Base(tokens=511),
    "rows576_tokens512": Base(rows=576),
    "fp16": Base(dtype=torch.float16),
    "whole_clip": Base(whole_clip=True),
    "sharded": Base(shard="64KB"),
    "bin": Base(safetensors=False),
    "sharded_bin": Base(shard="64KB", safetensors=False),
}


def _lora(more: str = "", *, bias: str = "none") -> str:
    return f"dict(type=LoraConfig, r=8, lora_alpha=16, lora_dropout=0.05, bias='{bias}'{more})"


VIT_LORA = _lora()
LLM_LORA = _lora(", task_type='CAUSAL_LM'")


def _checkpoint(name: str) -> Path:
    return Path("cases", name, "pth", "iter_2.pth")


@dataclass(frozen=True)
class Case:
    """One training run. Lora fields are config text; a field left alone means that LLM and tower are trained whole."""

    base: str = "plain"
    freeze_llm: bool = False
    freeze_vit: bool = False
    llora: str | None = None
    vlora: str | None = None
    projector_depth: int | None = None
    visual_select_layer: int | None = None
    llm_dtype: str | None = None
    pretrained: str | None = None  # a case that stands earlier in CASES
    flags: tuple[str, ...] = ("--safe-serialization",)  # of pth_to_hf

    def settings(self) -> dict[str, object]:
        """The settings that differ from their defaults, under the names that the golden cases use."""
        optional = {
            "llora": self.llora,
            "vlora": self.vlora,
            "projector_depth": self.projector_depth,
            "visual_select_layer": self.visual_select_layer,
            "llm_dtype": self.llm_dtype,
            "pretrained": self.pretrained,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        return {"freeze_llm": self.freeze_llm, "freeze_vit": self.freeze_vit, **given}

    def config(self) -> str:
        """The text of the xtuner config. Base models are named relative to the output folder."""
        more = "".join(
            f"\n    {name}={value},"
            for name, value in (
                ("projector_depth", self.projector_depth),
                ("visual_select_layer", self.visual_select_layer),
            )
            if value is not None
        )
        return CONFIG.substitute(
            llm=f"parts/{self.base}/llm",
            visual_encoder=f"parts/{self.base}/vit",
            data=f"parts/{self.base}/data",
            pretrained_pth=f"'{_checkpoint(self.pretrained)}'" if self.pretrained else None,
            seed=2024,
            freeze_llm=self.freeze_llm,
            freeze_visual_encoder=self.freeze_vit,
            more_model=more,
            more_llm=f"\n        torch_dtype={self.llm_dtype}," if self.llm_dtype else "",
            llm_lora=f"\n    llm_lora={self.llora}," if self.llora else "",
            visual_encoder_lora=f",\n    visual_encoder_lora={self.vlora}" if self.vlora else "",
        )


def _tuned(**changes: object) -> Case:
    """A whole LLM with a LoRA over the frozen tower: what the published finetune configs train."""
    return Case(**{"freeze_vit": True, "vlora": VIT_LORA, **changes})  # type: ignore[arg-type]


def _adapters(**changes: object) -> Case:
    """LoRA over both frozen parts, so that each base's own weights matter."""
    return Case(**{"freeze_llm": True, "freeze_vit": True, "llora": LLM_LORA, "vlora": VIT_LORA, **changes})  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    "tied_embeddings": _tuned(base="tied"),
    "tied_embeddings_llmlora": _adapters(base="tied"),
    "tokens500_rows500": _tuned(base="tokens500"),
    "tokens510_rows510": _tuned(base="tokens510"),
    "tokens511_rows511": _tuned(base="tokens511"),
    "tokens512_rows576": _tuned(base="rows576_tokens512"),
    "projector_depth1": _tuned(projector_depth=1),
    "projector_depth3": _tuned(projector_depth=3),
    "llm_bf16_vitlora": _tuned(llm_dtype="torch.bfloat16"),
    "base_fp16_llmlora": _adapters(base="fp16"),
    "vitlora_rslora": _tuned(vlora=_lora(", use_rslora=True")),
    "vitlora_dora": _tuned(vlora=_lora(", use_dora=True")),
    "vitlora_patterns": _tuned(
        vlora=_lora(
            r", rank_pattern={'q_proj': 4, 'encoder.layers.0.mlp.fc1': 2, r'layers\.[12]\.mlp\.fc2': 16}"
            r", alpha_pattern={'v_proj': 32, r'layers\.[12]\.mlp\.fc2': 5}"
        )
    ),
    # One module under two keys: peft 0.12 looks both values up by the first key that matches, rank keys before alpha
    # keys, so that layers.1.mlp.fc2 keeps lora_alpha = 16 here.
    "vitlora_patterns_two_keys": _tuned(
        vlora=_lora(
            r", rank_pattern={r'layers\.[12]\.mlp\.fc2': 16}, alpha_pattern={r'layers\.1\.mlp\.fc2': 5, 'fc1': 32}"
        )
    ),
    "llmlora_patterns": _adapters(
        llora=_lora(
            r", task_type='CAUSAL_LM', rank_pattern={'layers.0.self_attn.k_proj': 2, 'down_proj': 12}"
            r", alpha_pattern={r'layers\.1\.self_attn\.[qv]_proj': 7, 'gate_proj': 24}"
        )
    ),
    "vitlora_bias_all": _tuned(vlora=_lora(bias="all")),
    "vitlora_bias_lora_only": _tuned(vlora=_lora(bias="lora_only")),
    "visual_select_layer_last": _tuned(visual_select_layer=-1),
    "whole_clip_vitlora": _tuned(base="whole_clip"),
    "llm_full_vit_frozen": Case(freeze_vit=True),
    "llmlora_vit_frozen": Case(freeze_llm=True, freeze_vit=True, llora=LLM_LORA),
    "vitlora_over_unfrozen_vit": Case(vlora=VIT_LORA),
    "llm_full_vit_full": Case(),
    "llmlora_vit_full": Case(freeze_llm=True, llora=LLM_LORA),
    "llm_frozen_vitlora": Case(freeze_llm=True, freeze_vit=True, vlora=VIT_LORA),
    "llmlora_dora": _adapters(llora=_lora(", task_type='CAUSAL_LM', use_dora=True")),
    "llmlora_modules_to_save": _adapters(
        llora=_lora(", task_type='CAUSAL_LM', modules_to_save=['embed_tokens', 'lm_head']")
    ),
    "llmlora_some_modules": _adapters(llora=_lora(", task_type='CAUSAL_LM', target_modules=['q_proj', 'v_proj']")),
    "base_sharded": _adapters(base="sharded"),
    "base_bin": _adapters(base="bin"),
    "base_sharded_bin": _adapters(base="sharded_bin"),
    "pretrain_projector": Case(freeze_llm=True, freeze_vit=True),
    "pretrain_vit_full": Case(freeze_llm=True),
    "pretrained_projector_llmlora": _adapters(pretrained="pretrain_projector"),
    # Trained with the first stage's tower, which the real converter does not look for: it forgets pretrained_pth.
    "pretrained_vit_full_vit_frozen": Case(freeze_vit=True, pretrained="pretrain_vit_full"),
    "output_sharded": _tuned(flags=("--safe-serialization", "--max-shard-size", "100KB")),
    "output_bin": _tuned(flags=()),
    "output_bin_adapters": _adapters(flags=()),
    "output_fp32": _tuned(flags=("--safe-serialization", "--fp32")),
}


@contextlib.contextmanager
def _lora_b_random() -> Iterator[None]:
    """Let every new LoRA start with a B that is not zero."""
    original = LoraLayer.reset_lora_parameters

    def reset(layer: LoraLayer, name: str, init: bool | str) -> None:
        original(layer, name, init)
        if name in layer.lora_B:
            torch.nn.init.normal_(layer.lora_B[name].weight, std=0.02)

    LoraLayer.reset_lora_parameters = reset
    try:
        yield
    finally:
        LoraLayer.reset_lora_parameters = original


def _in_child(work: Callable[[], None], log: Path) -> bool:
    """Run `work` in a forked child whose output goes to `log`; True when it ended without an exception."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    status = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        torch.set_num_threads(1)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _train(case: Case, config: Path, work_dir: Path) -> None:
    sys.argv = ["train", str(config), "--work-dir", str(work_dir)]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.llm_dtype is not None)
    with _lora_b_random(), autocast:
        train.main()


def _convert(config: Path, checkpoint: Path, target: Path, layout: str, flags: tuple[str, ...]) -> None:
    sys.argv = ["pth_to_hf", str(config), str(checkpoint), str(target), "--save-format", layout, *flags]
    pth_to_hf.main()


def _last_line(log: Path) -> str:
    """What the child died of: the line that names the exception, with the lines of a long message after it."""
    lines = log.read_text(errors="replace").strip().splitlines()
    last_frame = max((i for i, line in enumerate(lines) if line.startswith("  ") and 'File "' in line), default=0)
    tail = [line.strip() for line in lines[last_frame + 1 :]]
    start = next((i for i, line in enumerate(tail) if line.split(":")[0].endswith("Error")), 0)
    return " ".join(tail[start:])[:400]


@dataclass
class Outcome:
    """What became of a case: formats made, and why the others were not."""

    seconds: float = 0.0
    made: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run_case(name: str, case: Case) -> Outcome:
    """Train and convert one case below the current folder; a half-made folder of a crashed conversion is removed."""
    started = time.monotonic()
    outcome = Outcome()
    folder, work_dir = Path("cases", name), Path("work", name)
    for old in (folder, work_dir):
        shutil.rmtree(old, ignore_errors=True)
    (folder / "pth").mkdir(parents=True)
    work_dir.mkdir(parents=True)
    config = folder / "config.py"
    config.write_text(case.config())
    log = work_dir / "train.log"
    checkpoint = _checkpoint(name)
    trained = _in_child(lambda: _train(case, config, work_dir), log)
    if trained and (work_dir / checkpoint.name).is_file():
        (work_dir / checkpoint.name).rename(checkpoint)
        for layout in FORMATS:
            log = work_dir / f"{layout}.log"
            target = folder / layout

            def convert(layout: str = layout, target: Path = target) -> None:
                _convert(config, checkpoint, target, layout, case.flags)

            if _in_child(convert, log):
                outcome.made.append(layout)
            else:
                shutil.rmtree(target, ignore_errors=True)
                outcome.failed[layout] = _last_line(log)
    else:
        outcome.failed["train"] = _last_line(log)
    for large in work_dir.glob("*.pth"):
        large.unlink()
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def _index(outcomes: dict[str, Outcome]) -> None:
    """Add to cases.json (case -> base models, settings, what was made); cases made by an earlier run stay."""
    index = Path("cases.json")
    known = json.loads(index.read_text()) if index.is_file() else {}
    for name, outcome in outcomes.items():
        case = CASES[name]
        known[name] = {
            "llm": f"parts/{case.base}/llm/config.json",
            "visual_encoder": f"parts/{case.base}/vit/config.json",
            "settings": case.settings(),
            "made": outcome.made,
            "failed": outcome.failed,
        }
    index.write_text(json.dumps({name: known[name] for name in CASES if name in known}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=CHECKOUT / ".venvs" / "cases", help="default .venvs/cases")
    parser.add_argument(
        "--only", nargs="+", choices=CASES, metavar="CASE", help="make these cases only: " + ", ".join(CASES)
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer to use where a base wants as many tokens as it has"
    )
    parser.add_argument("--missing", action="store_true", help="leave cases alone that cases.json already names")
    return parser.parse_args()


def main() -> None:
    """Make the base models, then every case, with a line each on stderr."""
    arguments = _arguments()
    tokenizer_from = arguments.tokenizer.resolve() if arguments.tokenizer else None
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Configs name everything relative to here (mmengine itself records work_dir as an absolute path in message_hub).
    os.chdir(arguments.out)
    done = json.loads(Path("cases.json").read_text()) if arguments.missing and Path("cases.json").is_file() else {}
    names = [name for name in arguments.only or CASES if name not in done]
    for base in sorted({CASES[name].base for name in names}):
        target = Path("parts", base)
        if not (target / "data" / "train.json").is_file():
            log = Path(f"{base}.log")
            if not _in_child(lambda base=base, target=target: write_base(BASES[base], target, tokenizer_from), log):
                sys.exit(f"base {base}: {_last_line(log)}")
            log.unlink()
    for name in names:
        outcome = run_case(name, CASES[name])
        _index({name: outcome})
        print(f"{name}: {outcome.seconds} s, made {outcome.made}, failed {outcome.failed}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
