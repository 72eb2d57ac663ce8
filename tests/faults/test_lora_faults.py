"""Adapters that cannot be merged, or only in one right way: rows 58 to 64 of the fault list, through the command line.

The sources are the xtuner layout, whose `visual_encoder_adapter/` is what peft saves, and `.pth` files, which hold the
same tensors as the model under training names them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.corpus import (
    TINY,
    Corpus,
    State,
    accepted,
    edit_json,
    edit_tensors,
    refused,
    run,
    tiny,
    trained,
    write_pth,
)
from tests.golden.oracle import load

VIT = ("--visual-encoder", TINY / "vit")
FOLDER = "visual_encoder_adapter"
LAYER = "vision_model.encoder.layers.1"
MODULE = f"{LAYER}.self_attn.q_proj"
OTHER = f"{LAYER}.mlp.fc1"
A, B = "lora_A.weight", "lora_B.weight"


@pytest.fixture
def source(corpus: Corpus, tmp_path: Path) -> Path:
    return corpus.copy("xtuner", tmp_path)


def saved(module: str, tail: str) -> str:
    return f"base_model.model.{module}.{tail}"


def edit_adapter(source: Path, change: Callable[[State], State | None]) -> None:
    edit_tensors(source / FOLDER / "adapter_model.safetensors", change)


def configure(source: Path, **changes: Any) -> None:
    edit_json(source / FOLDER / "adapter_config.json", **changes)


def adapter(source: Path) -> State:
    return load_file(source / FOLDER / "adapter_model.safetensors")


def to_hf(source: Path, *more: str | Path, layout: str = "xtuner") -> tuple[str | Path, ...]:
    return (layout, source, "--to", "hf", "-o", source.parent / "out", *VIT, *more)


def tower(out: Path) -> State:
    """The tower's tensors in an `hf` output, by their names in the tower."""
    found = load(out)
    return {k.removeprefix("vision_tower."): v for k, v in found.items() if k.startswith("vision_tower.")}


def base() -> State:
    return load_file(TINY / "vit" / "model.safetensors")


def merged(module: str, tensors: State, scale: float, magnitude: torch.Tensor | None = None) -> torch.Tensor:
    """What the adapter makes of a weight, by the definition: W + scale · B·A, for DoRA scaled to `magnitude`."""
    weight = base()[f"{module}.weight"].double()
    weight = weight + scale * tensors[saved(module, B)].double() @ tensors[saved(module, A)].double()
    if magnitude is not None:
        weight = magnitude.double()[:, None] * weight / weight.norm(dim=1, keepdim=True)
    return weight


def assert_merged(out: Path, module: str, wanted: torch.Tensor) -> None:
    """Equal but for the one rounding to float16."""
    found = tower(out)[f"{module}.weight"].double()
    assert torch.allclose(found, wanted, rtol=2**-10, atol=2**-20), (found - wanted).abs().max()
    assert not torch.allclose(found, base()[f"{module}.weight"].double(), rtol=2**-10, atol=2**-20)


# -- 58: targets


def test_fault_58_no_target_matches(source: Path, tmp_path: Path) -> None:
    edit_adapter(source, lambda s: {k.replace("encoder.layers", "encoder.blocks"): v for k, v in s.items()})
    refused(tmp_path, 3, "vision tower", "18 modules", "vision_model.encoder.blocks.", args=to_hf(source))


def test_fault_58_some_targets_do_not_match(source: Path, tmp_path: Path) -> None:
    edit_adapter(source, lambda s: {k.replace("layers.1.mlp.fc1", "layers.7.mlp.fc1"): v for k, v in s.items()})
    refused(tmp_path, 3, "does not have 1 of them", f"vision_tower.{OTHER.replace('.1.', '.7.')}", args=to_hf(source))


@pytest.mark.parametrize("tail", [A, B])
def test_fault_58_half_an_adapter(source: Path, tmp_path: Path, tail: str) -> None:
    edit_adapter(source, lambda s: {k: v for k, v in s.items() if k != saved(MODULE, tail)})
    refused(tmp_path, 3, f"the LoRA of vision_tower.{MODULE} has only", args=to_hf(source))


# -- 59: variants that change the arithmetic


def test_fault_59_plain(source: Path) -> None:
    accepted(*to_hf(source, "--verify", "full"))
    assert_merged(source.parent / "out", MODULE, merged(MODULE, adapter(source), 16 / 8))


def test_fault_59_rank_stabilised(source: Path) -> None:
    configure(source, use_rslora=True)
    accepted(*to_hf(source, "--verify", "full"))
    assert_merged(source.parent / "out", MODULE, merged(MODULE, adapter(source), 16 / 8**0.5))


def test_fault_59_rank_and_alpha_patterns(source: Path) -> None:
    configure(source, rank_pattern={"layers.1.self_attn.q_proj": 4}, alpha_pattern={".*fc1": 40})

    def change(state: State) -> None:
        state[saved(MODULE, A)] = state[saved(MODULE, A)][:4]
        state[saved(MODULE, B)] = state[saved(MODULE, B)][:, :4]

    edit_adapter(source, change)
    accepted(*to_hf(source, "--verify", "full"))
    assert_merged(source.parent / "out", MODULE, merged(MODULE, adapter(source), 16 / 4))
    assert_merged(source.parent / "out", OTHER, merged(OTHER, adapter(source), 40 / 8))
    plain = f"{LAYER}.self_attn.k_proj"
    assert_merged(source.parent / "out", plain, merged(plain, adapter(source), 16 / 8))


def test_fault_59_a_rank_that_the_weights_do_not_have(source: Path, tmp_path: Path) -> None:
    configure(source, rank_pattern={"fc1": 4})
    refused(tmp_path, 3, "r = 4", "r = 8", "fc1", args=to_hf(source))


@pytest.mark.parametrize("pattern", ["(a+)+b", "[", "x" * 300, "(.*.*)*fc1"])
def test_fault_59_patterns_that_cannot_be_matched_safely(source: Path, tmp_path: Path, pattern: str) -> None:
    configure(source, rank_pattern={pattern: 4})
    refused(tmp_path, 3 if pattern == "[" else 4, "rank_pattern", args=to_hf(source))


@pytest.mark.parametrize("value", [7, "x", [1], {"fc1": "4"}, {"fc1": None}])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_fault_59_patterns_that_are_none(source: Path, tmp_path: Path, key: str, value: object) -> None:
    configure(source, **{key: value})
    refused(tmp_path, 3, "adapter_config.json", key, args=to_hf(source))


def test_fault_59_dora(source: Path) -> None:
    size = base()[f"{MODULE}.weight"].norm(dim=1) * torch.linspace(0.5, 1.5, 32)
    configure(source, use_dora=True)
    edit_adapter(source, lambda s: {**s, saved(MODULE, "lora_magnitude_vector"): size})
    edit_adapter(source, lambda s: {k: v for k, v in s.items() if MODULE in k})
    accepted(*to_hf(source, "--verify", "full"))
    assert_merged(source.parent / "out", MODULE, merged(MODULE, adapter(source), 2, size))


def test_fault_59_dora_without_its_magnitudes(source: Path, tmp_path: Path) -> None:
    configure(source, use_dora=True)
    refused(tmp_path, 3, "DoRA", "magnitude", args=to_hf(source))


def test_fault_59_fan_in_fan_out(source: Path, tmp_path: Path) -> None:
    configure(source, fan_in_fan_out=True)
    refused(tmp_path, 4, "fan_in_fan_out", args=to_hf(source))


@pytest.mark.parametrize("tail", ["bias", "base_layer.bias"])
def test_fault_59_trained_biases(source: Path, tail: str) -> None:
    configure(source, bias="lora_only")
    bias = torch.linspace(-1, 1, 32)
    edit_adapter(source, lambda s: {**s, saved(MODULE, tail): bias})
    accepted(*to_hf(source, "--verify", "full"))
    found = tower(source.parent / "out")
    assert torch.equal(found[f"{MODULE}.bias"], bias.half())
    assert torch.equal(found[f"{OTHER}.bias"], base()[f"{OTHER}.bias"].half())


def test_fault_59_modules_to_save(source: Path) -> None:
    configure(source, modules_to_save=["post_layernorm"])
    weight = torch.linspace(-1, 1, 32)
    edit_adapter(source, lambda s: {**s, saved("vision_model.post_layernorm", "weight"): weight})
    accepted(*to_hf(source, "--verify", "full"))
    assert torch.equal(tower(source.parent / "out")["vision_model.post_layernorm.weight"], weight.half())


def test_fault_59_a_module_to_save_that_the_model_lacks(source: Path, tmp_path: Path) -> None:
    edit_adapter(source, lambda s: {**s, saved("vision_model.classifier", "weight"): torch.ones(3)})
    refused(tmp_path, 4, "classifier.weight", args=to_hf(source))


# -- 60: other kinds of adapter


@pytest.mark.parametrize("kind", ["ADALORA", "VERA", "LOHA", "LOKR", "IA3", "OFT", "PREFIX_TUNING", "BOFT"])
@pytest.mark.parametrize("has_r", [True, False])
def test_fault_60_other_kinds(source: Path, tmp_path: Path, kind: str, has_r: bool) -> None:
    configure(source, peft_type=kind, r=8 if has_r else None)
    refused(tmp_path, 4, f"type {kind}", "adapter_config.json", args=to_hf(source))


def test_fault_60_tensors_of_another_kind(source: Path, tmp_path: Path) -> None:
    """AdaLoRA's third factor, under a config that says LoRA."""
    edit_adapter(source, lambda s: {**s, saved(MODULE, "lora_E.default"): torch.ones(8, 1)})
    refused(tmp_path, 4, "lora_E", args=to_hf(source))


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_16"])
def test_fault_60_pissa(source: Path, tmp_path: Path, how: str) -> None:
    configure(source, init_lora_weights=how)
    refused(tmp_path, 4, "PiSSA", args=to_hf(source))


@pytest.mark.parametrize(("rank", "code"), [(0, 4), (-1, 3), (1.5, 3), ("8", 3), (None, 3), (True, 3)])
def test_fault_60_no_rank(source: Path, tmp_path: Path, rank: object, code: int) -> None:
    configure(source, r=rank)
    refused(tmp_path, code, "adapter_config.json", "r ", args=to_hf(source))


def test_fault_60_no_adapter_config(source: Path, tmp_path: Path) -> None:
    (source / FOLDER / "adapter_config.json").unlink()
    refused(tmp_path, 4, "alpha", "rank 8", args=to_hf(source), mend="--lora-alpha")
    accepted(*to_hf(source, "--lora-alpha", "16"))
    assert_merged(source.parent / "out", MODULE, merged(MODULE, adapter(source), 16 / 8))


@pytest.mark.parametrize("content", ["[]", '"x"', "3", "null", "{", ""])
def test_fault_60_a_broken_adapter_config(source: Path, tmp_path: Path, content: str) -> None:
    (source / FOLDER / "adapter_config.json").write_text(content)
    refused(tmp_path, 3, "adapter_config.json", args=to_hf(source))


# -- 61: another base


def test_fault_61_shapes_of_another_base(source: Path, tmp_path: Path) -> None:
    edit_adapter(source, lambda s: {**s, saved(MODULE, B): torch.ones(48, 8)})
    refused(tmp_path, 3, f"vision_tower.{MODULE}", "B [48, 8]", "weight [32, 32]", args=to_hf(source))


def test_fault_61_a_base_of_another_name_is_warned_of(source: Path) -> None:
    configure(source, base_model_name_or_path="openai/clip-vit-large-patch14")
    cached = source.parent / "models--openai--clip-vit-base-patch32" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    for file in (TINY / "vit").iterdir():
        (cached / file.name).write_bytes(file.read_bytes())
    ran = accepted(*to_hf(source, "--visual-encoder", cached, "--json"))
    warned = [w for w in ran.report["warnings"] if "openai/clip-vit-large-patch14" in w]
    assert len(warned) == 1 and "openai/clip-vit-base-patch32" in warned[0]


# -- 62: quantised bases


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
@pytest.mark.parametrize("part", ["vit", "llm"])
def test_fault_62_a_base_stored_quantised(tmp_path: Path, method: str, part: str) -> None:
    state, cfg = trained()
    source = tiny(tmp_path)
    if part == "llm":
        state = {k: v for k, v in state.items() if not k.startswith("llm.")}
        cfg = cfg.replace("freeze_llm=False", "freeze_llm=True")
    write_pth(source, state, cfg)
    edit_json(tmp_path / "tiny" / part / "config.json", quantization_config={"quant_method": method})
    mend = {"vit": "--visual-encoder", "llm": "--llm"}[part]
    args = ("pth", source, "--to", "hf", "-o", tmp_path / "out")
    named = {"gptq": "GPTQ", "awq": "AWQ"}.get(method, method)
    refused(tmp_path, 4, f"stored quantised ({named})", args=args, mend=mend)


@pytest.mark.parametrize("stated", ["4bit", 8, [], None])
def test_fault_62_packed_weights_are_no_weights(tmp_path: Path, stated: object) -> None:
    """Names of bitsandbytes in the file, and a config that says so wrongly or not at all."""
    source = tiny(tmp_path)
    vit = tmp_path / "tiny" / "vit"
    edit_json(vit / "config.json", quantization_config=stated)
    edit_tensors(vit / "model.safetensors", lambda s: {**s, f"{MODULE}.weight.absmax": torch.ones(4)})
    refused(tmp_path, 4, args=("pth", source, "--to", "hf", "-o", tmp_path / "out"))


def test_fault_62_training_that_loaded_in_four_bits(tmp_path: Path) -> None:
    """QLoRA: the files are of full precision, and the merge goes into them; report and card say so."""
    state, cfg = trained()
    cfg = cfg.replace(
        "    llm=dict(\n",
        "    llm=dict(\n        quantization_config=dict(load_in_4bit=True, type='transformers.BitsAndBytesConfig'),\n",
        1,
    )
    source = write_pth(tiny(tmp_path), state, cfg)
    ran = accepted("pth", source, "--to", "hf", "-o", tmp_path / "out", "--json")
    assert any("loaded the LLM quantised" in note for note in ran.report["notes"])
    assert "quantised" in (tmp_path / "out" / "README.md").read_text()


# -- 63: names


def test_fault_63_dialects_of_names_are_one(corpus: Corpus, tmp_path: Path) -> None:
    """`default` in the middle (as under training), peft wrapped twice: the output is the same, byte for byte."""
    outs = {}
    for name in ("plain", "default", "twice"):
        folder = tmp_path / name
        source = corpus.copy("xtuner", folder)
        if name == "default":
            edit_adapter(source, lambda s: {k.replace(".weight", ".default.weight"): v for k, v in s.items()})
        elif name == "twice":
            edit_adapter(source, lambda s: {f"base_model.model.{k}": v for k, v in s.items()})
        else:
            edit_adapter(source, lambda s: None)
        accepted(*to_hf(source))
        outs[name] = {file.name: file.read_bytes() for file in (folder / "out").glob("*.safetensors")}
    assert outs["plain"] == outs["default"] == outs["twice"]


def test_fault_63_live_names_in_a_pth(corpus: Corpus, tmp_path: Path) -> None:
    """A `.pth` in peft's live dialect, and the same with the saved one, which xtuner writes."""
    state, cfg = trained()
    live = any(".lora_A.default.weight" in name for name in state)
    swapped = {
        k.replace(".default.weight", ".weight") if live else k.replace("lora_A.weight", "lora_A.default.weight"): v
        for k, v in state.items()
    }
    outs = []
    for number, names in enumerate((state, swapped)):
        source = write_pth(tiny(tmp_path / str(number)), names, cfg)
        accepted("pth", source, "--to", "hf", "-o", tmp_path / str(number) / "out")
        outs.append((tmp_path / str(number) / "out" / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]
    assert outs[0] == (corpus.layouts["hf"] / "model.safetensors").read_bytes()


def test_fault_63_two_names_of_one_tensor(source: Path, tmp_path: Path) -> None:
    def change(state: State) -> None:
        state[f"base_model.model.{saved(MODULE, A)}"] = state[saved(MODULE, A)] + 1

    edit_adapter(source, change)
    refused(tmp_path, 3, f"vision_tower.{MODULE}.lora_A.weight", args=to_hf(source))


# -- 64: twice


def test_fault_64_the_same_lora_twice_into_one_base(tmp_path: Path) -> None:
    """A tower which this adapter was merged into is no base for it; its conversion.json tells."""
    source = tiny(tmp_path)
    once = tmp_path / "once"
    accepted("pth", source, "--to", "hf", "--part", "visual-encoder", "-o", once)
    args = ("pth", source, "--to", "hf", "-o", tmp_path / "out", "--visual-encoder", once)
    refused(tmp_path, 4, "already merged into the base", "iter_2.pth", args=args, mend="--visual-encoder")
    # Another checkpoint's adapter on top is a way to train on: that is not refused.
    state, cfg = trained()
    other = write_pth(tmp_path / "tiny" / "iter_4.pth", {k: v * 0.5 for k, v in state.items()}, cfg)
    accepted("pth", other, "--to", "hf", "-o", tmp_path / "out", "--visual-encoder", once)


def test_fault_64_without_a_record_nothing_tells(tmp_path: Path) -> None:
    """What provenance cannot say is not claimed: without conversion.json the merged tower is a tower like any other."""
    source = tiny(tmp_path)
    once = tmp_path / "once"
    accepted("pth", source, "--to", "hf", "--part", "visual-encoder", "-o", once)
    (once / "conversion.json").unlink()
    accepted("pth", source, "--to", "hf", "-o", tmp_path / "out", "--visual-encoder", once)


def test_fault_64_a_merged_output_takes_no_second_merge(corpus: Corpus, tmp_path: Path) -> None:
    """Converted on, an output carries its merged weights as they are: no op but a copy."""
    source = corpus.copy("official", tmp_path)
    ran = run("official", source, "--to", "hf", "-o", tmp_path / "out", "--json", *VIT)
    assert ran.code == 0 and set(ran.report["ops"]) <= {"copy", "pad_rows"}
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert not any(op["op"] == "merge_lora" for t in record["tensors"].values() for op in t.get("ops", []))


def test_fault_58_an_empty_adapter(source: Path, tmp_path: Path) -> None:
    save_file({}, source / FOLDER / "adapter_model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, 3, "adapter_model.safetensors", args=to_hf(source))
