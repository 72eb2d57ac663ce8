"""Adapters of every trainer and name, laid over bases of every layout: bit for bit a merge in float64, rounded once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import llava_convert
from llava_convert.core.errors import ConvertError, InputError, UnsupportedError, UsageError
from tests.field.conftest import Models, Tensors, edit

RANK, ALPHA = 4, 8
Q, FC1, LINEAR = (
    "language_model.model.layers.1.self_attn.q_proj",
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
    "multi_modal_projector.linear_1",
)
# The same modules as each range of releases of transformers calls them in memory.
NAMES = {
    "4.46": {Q: Q, FC1: FC1, LINEAR: LINEAR},
    "4.57": {
        Q: "model.language_model.layers.1.self_attn.q_proj",
        FC1: f"model.{FC1}",
        LINEAR: f"model.{LINEAR}",
    },
    "5.24": {
        Q: "model.language_model.layers.1.self_attn.q_proj",
        FC1: "model.vision_tower.encoder.layers.0.mlp.fc1",
        LINEAR: f"model.{LINEAR}",
    },
}


def pair(base: Tensors, module: str, rank: int = RANK, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    noise = np.random.default_rng(seed)
    rows, columns = base[f"{module}.weight"].shape
    a, b = noise.normal(size=(rank, columns)), noise.normal(size=(rows, rank))
    return (a * 0.1).astype(np.float32), (b * 0.1).astype(np.float32)


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    return (weight.astype(np.float64) + scale * (b.astype(np.float64) @ a.astype(np.float64))).astype(weight.dtype)


def write_adapter(folder: Path, base: Path | str, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(parents=True)
    file = folder / "adapter_model.safetensors"
    save_file({f"base_model.model.{n}": np.ascontiguousarray(v) for n, v in tensors.items()}, file, {"format": "pt"})
    said = {"base_model_name_or_path": str(base), "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps({**said, "target_modules": ["q_proj"], **config}))
    return folder


def lora(base: Tensors, modules: dict[str, str], **more: Any) -> Tensors:
    found: Tensors = {}
    for module, name in modules.items():
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = pair(base, module, **more)
    return found


@pytest.fixture(scope="module")
def hf(models: Models) -> Tensors:
    return load_file(models["hf"] / "model.safetensors")


def load(out: Path) -> Tensors:
    """All shards: there is one for each file that the tensors come from."""
    return {name: value for file in sorted(out.glob("*.safetensors")) for name, value in load_file(file).items()}


def check(out: Path, base: Tensors, changed: Tensors) -> None:
    found = load(out)
    assert found.keys() == base.keys()
    for name, value in {**base, **changed}.items():
        assert np.array_equal(found[name].view(np.uint16), value.view(np.uint16)), name


# --- peft over transformers' LLaVA


@pytest.mark.parametrize("variant", ["plain", "rslora", "patterns"])
@pytest.mark.parametrize("release", NAMES)
def test_every_release_and_factor(models: Models, hf: Tensors, tmp_path: Path, release: str, variant: str) -> None:
    names = NAMES[release]
    config = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "patterns": {"alpha_pattern": {r"layers\.0\.mlp\.fc1": 3, f"{names[LINEAR].replace('.', chr(92) + '.')}": 5}},
    }[variant]
    alphas = {Q: ALPHA, FC1: 3, LINEAR: 5} if variant == "patterns" else dict.fromkeys(names, ALPHA)
    source = write_adapter(tmp_path / "adapter", models["hf"], lora(hf, names), **config)
    llava_convert.convert(source, to="hf", out=tmp_path / "out", verify="full")
    by = RANK**0.5 if variant == "rslora" else RANK
    changed = {f"{m}.weight": merged(hf[f"{m}.weight"], *pair(hf, m), alphas[m] / by) for m in names}
    check(tmp_path / "out", hf, changed)
    assert llava_convert.verify(source, tmp_path / "out")


def test_a_merge_keeps_the_dtype_in_a_pth(models: Models, hf: Tensors, tmp_path: Path) -> None:
    """It is computed in float64, and was stored so."""
    source = write_adapter(tmp_path / "adapter", models["hf"], lora(hf, {Q: NAMES["5.24"][Q]}))
    llava_convert.convert(source, to="pth", out=tmp_path / "out")
    state = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float16}
    wanted = merged(hf[f"{Q}.weight"], *pair(hf, Q), 2)
    assert np.array_equal(state["llm.model.layers.1.self_attn.q_proj.weight"].numpy(), wanted)


def test_what_is_trained_whole(models: Models, hf: Tensors, tmp_path: Path) -> None:
    """modules_to_save, biases, and single tokens."""
    rows = np.random.default_rng(5).normal(size=(2, 32)).astype(np.float32)
    embedding, bias = "language_model.model.embed_tokens.weight", f"{FC1}.bias"
    rows = np.resize(rows, (2, hf[embedding].shape[1]))
    tensors = lora(hf, {Q: NAMES["5.24"][Q]})
    tensors[f"model.{LINEAR}.weight"] = whole = hf[f"{LINEAR}.weight"].astype(np.float32) * 2
    tensors["model.vision_tower.encoder.layers.0.mlp.fc1.base_layer.bias"] = hf[bias].astype(np.float32) + 1
    tensors["model.language_model.embed_tokens.token_adapter.trainable_tokens_delta"] = rows
    source = write_adapter(
        tmp_path / "adapter",
        models["hf"],
        tensors,
        bias="lora_only",
        modules_to_save=["linear_1"],
        trainable_token_indices={"embed_tokens": [7, 2]},
    )
    llava_convert.convert(source, to="hf", out=tmp_path / "out", verify="full")
    trained = hf[embedding].copy()
    trained[[7, 2]] = rows.astype(np.float16)
    changed = {
        f"{Q}.weight": merged(hf[f"{Q}.weight"], *pair(hf, Q), 2),
        f"{LINEAR}.weight": whole.astype(np.float16),
        bias: (hf[bias].astype(np.float32) + 1).astype(np.float16),
        embedding: trained,
    }
    check(tmp_path / "out", hf, changed)


def test_several_in_a_row_round_once(models: Models, hf: Tensors, tmp_path: Path) -> None:
    folders = [
        write_adapter(tmp_path / str(seed), models["hf"], lora(hf, {Q: name}, seed=seed))
        for seed, name in enumerate((NAMES["4.46"][Q], NAMES["5.24"][Q]), 1)
    ]
    llava_convert.merge(models["hf"], adapter=folders, out=tmp_path / "out")
    weight = hf[f"{Q}.weight"].astype(np.float64)
    for seed in (1, 2):
        a, b = (side.astype(np.float64) for side in pair(hf, Q, seed=seed))
        weight = weight + 2 * (b @ a)
    check(tmp_path / "out", hf, {f"{Q}.weight": weight.astype(np.float16)})


@pytest.mark.parametrize("layout", ["official", "xtuner", "gguf"])
def test_the_base_is_of_any_layout(models: Models, hf: Tensors, tmp_path: Path, layout: str) -> None:
    """The adapter names a model that is not here."""
    source = write_adapter(tmp_path / "adapter", "org/llava", lora(hf, {m: NAMES["5.24"][m] for m in (Q, LINEAR)}))
    base = models[layout]
    if layout == "gguf":
        base = tmp_path / "f16"
        llava_convert.convert(models["hf"], to="gguf", out=base, outtype="f16", mmproj_outtype="f16")
    with pytest.raises(InputError, match="was not found: it is not a folder here"):
        llava_convert.convert(source, to="hf", out=tmp_path / "out")
    tower = {"visual_encoder": str(models.tower)} if layout == "xtuner" else {}  # of which it holds a LoRA
    report = llava_convert.convert(source, to="hf", out=tmp_path / "out", base=str(base), **tower)
    assert any("was trained on org/llava" in told for told in report.warnings)
    found = load(tmp_path / "out")
    for module in (Q, LINEAR) if layout != "xtuner" else (Q,):  # which keeps the projector in float32
        want = merged(hf[f"{module}.weight"], *pair(hf, module), 2)
        assert np.array_equal(found[f"{module}.weight"], want)


def test_a_run_is_followed(models: Models, hf: Tensors, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 10):
        folder = write_adapter(run / f"checkpoint-{step}", models["hf"], lora(hf, {Q: NAMES["5.24"][Q]}, seed=step))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_model_checkpoint": None}))
    (run / "checkpoint-20").mkdir()  # which the trainer had begun
    report = llava_convert.convert(run, to="hf", out=tmp_path / "newest")
    assert any("checkpoint-10 is taken, the newest" in note for note in report.notes)
    check(tmp_path / "newest", hf, {f"{Q}.weight": merged(hf[f"{Q}.weight"], *pair(hf, Q, seed=10), 2)})
    state = {"best_model_checkpoint": "/somewhere/run/checkpoint-2"}
    (run / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(state))
    report = llava_convert.convert(run, to="hf", out=tmp_path / "best")
    assert any("checkpoint-2 is taken, the best" in note for note in report.notes)
    check(tmp_path / "best", hf, {f"{Q}.weight": merged(hf[f"{Q}.weight"], *pair(hf, Q, seed=2), 2)})


@pytest.mark.parametrize(
    ("tensors", "kind", "said"),
    [
        (
            {"model.language_model.layers.9.self_attn.q_proj": Q},
            InputError,
            "adapts 1 modules, but the model does not have 1",
        ),
        ({"transformer.h.0.attn.c_attn": Q}, UnsupportedError, "2 of 2 tensors belong to no module of a LLaVA"),
    ],
)
def test_what_matches_nothing_is_counted(
    models: Models, hf: Tensors, tmp_path: Path, tensors: dict[str, str], kind: type[ConvertError], said: str
) -> None:
    named = {module: name for name, module in tensors.items()}
    source = write_adapter(tmp_path / "adapter", models["hf"], lora(hf, named))
    with pytest.raises(kind, match=said):
        llava_convert.convert(source, to="hf", out=tmp_path / "out")


def test_what_zero3_left_empty_is_named(models: Models, hf: Tensors, tmp_path: Path) -> None:
    tensors = {name: np.zeros((0,), np.float32) for name in lora(hf, {Q: Q})}
    source = write_adapter(tmp_path / "adapter", models["hf"], tensors)
    with pytest.raises(InputError, match=r"2 tensors hold no data.*ZeRO-3"):
        llava_convert.convert(source, to="hf", out=tmp_path / "out")


def test_a_base_that_has_it_already(models: Models, hf: Tensors, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter", models["hf"], lora(hf, {Q: Q}))
    llava_convert.convert(source, to="hf", out=tmp_path / "out")
    for base in (tmp_path / "out", source):
        with pytest.raises(UnsupportedError, match="is already merged into the base"):
            llava_convert.convert(source, to="official", out=tmp_path / "twice", base=str(base))


def test_the_base_is_an_adapter_over_its_own(models: Models, hf: Tensors, tmp_path: Path) -> None:
    one, two = (
        write_adapter(tmp_path / str(seed), models["hf"], lora(hf, {Q: NAMES["5.24"][Q]}, seed=seed)) for seed in (1, 2)
    )
    llava_convert.convert(two, to="hf", out=tmp_path / "out", base=str(one))
    weight = hf[f"{Q}.weight"].astype(np.float64)
    for seed in (1, 2):
        a, b = (side.astype(np.float64) for side in pair(hf, Q, seed=seed))
        weight = weight + 2 * (b @ a)
    check(tmp_path / "out", hf, {f"{Q}.weight": weight.astype(np.float16)})


def test_the_model_in_the_place_of_the_adapter(models: Models, hf: Tensors, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter", models["hf"], lora(hf, {Q: Q}))
    with pytest.raises(InputError, match="holds no adapter") as refused:
        llava_convert.merge(source, adapter=[models["hf"]], out=tmp_path / "out")
    assert "the base comes first" in str(refused.value.hint)


def test_a_projector_over_a_converted_model(tiny: Path, tmp_path: Path) -> None:
    """Whose rows for <image> and <pad> were added by the conversion: they come with their tokens."""
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "hf")
    trained = load_file(tmp_path / "hf" / "model.safetensors")
    torch.save(bridge(trained, "model.mm_projector."), tmp_path / "mm_projector.bin")
    llava_convert.convert(tmp_path / "mm_projector.bin", to="hf", out=tmp_path / "out", base=str(tmp_path / "hf"))
    check(tmp_path / "out", with_bridge(trained), {})


def test_none_is_no_choice_for_an_adapter_itself(models: Models, hf: Tensors, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter", models["hf"], lora(hf, {Q: Q}))
    with pytest.raises(UsageError, match="does not apply: adapter is an adapter itself"):
        llava_convert.convert(source, to="hf", out=tmp_path / "out", adapter="none")
    assert not (tmp_path / "out").exists()


def test_a_projector_beside_a_config_of_transformers(models: Models, hf: Tensors, tmp_path: Path) -> None:
    """The hint is followed."""
    torch.save(bridge(hf, "model.mm_projector."), tmp_path / "mm_projector.bin")
    with pytest.raises(UnsupportedError, match="the config is that of a transformers LLaVA") as refused:
        llava_convert.convert(tmp_path / "mm_projector.bin", to="hf", out=tmp_path / "out", config_from=models["hf"])
    assert "base" in str(refused.value.hint)
    llava_convert.convert(tmp_path / "mm_projector.bin", to="hf", out=tmp_path / "out", base=str(models["hf"]))
    check(tmp_path / "out", with_bridge(hf), {})


def test_what_is_no_adapter_does_not_become_one(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="holds no adapter of the model"):
        llava_convert.convert(models["official"], to="peft", out=tmp_path / "out")
    with pytest.raises(UnsupportedError, match="the language model was trained whole") as refused:
        llava_convert.convert(models["pth"], to="peft", out=tmp_path / "out")
    assert "part='visual-encoder'" in str(refused.value.hint) and not (tmp_path / "out").exists()
    llava_convert.convert(models["pth"], to="peft", out=tmp_path / "tower", part="visual-encoder")
    assert llava_convert.verify(models["pth"], tmp_path / "tower", part="visual-encoder")
    config = json.loads((tmp_path / "tower" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        f"model.vision_tower.encoder.layers.{layer}.{module}"
        for layer in range(3)
        for module in ("mlp.fc1", "mlp.fc2", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")))
    }


def test_a_base_without_use(models: Models, hf: Tensors, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="base does not apply"):
        llava_convert.convert(models["hf"], to="official", out=tmp_path / "out", base=str(models["official"]))
    source = write_adapter(tmp_path / "adapter", models["hf"], lora(hf, {Q: Q}))
    with pytest.raises(UsageError, match="does not apply: an adapter holds the name"):
        llava_convert.convert(source, to="peft", out=tmp_path / "out", base=str(models["hf"]))
    llava_convert.convert(source, to="peft", out=tmp_path / "out", base="org/llava-hf")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/llava-hf"


# --- official LLaVA's trainings


@pytest.fixture
def official(models: Models, hf: Tensors, tmp_path: Path) -> Path:
    """A LoRA over a whole LLaVA with a tower of its own: on the language model, the tower and the projector."""
    names = {
        Q: "model.layers.1.self_attn.q_proj",
        FC1: "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        LINEAR: "model.mm_projector.0",
    }
    source = write_adapter(tmp_path / "lora", models["official"], lora(hf, names))
    config = json.loads((models["official"] / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": str(models["official"])}))
    torch.save(bridge(hf, "base_model.model.model.mm_projector."), source / "non_lora_trainables.bin")
    return source


def bridge(hf: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """Another projector than the base's."""
    found = {name: value for name, value in hf.items() if name.startswith("multi_modal_projector.")}
    index = {"linear_1": "0", "linear_2": "2"}
    return {f"{prefix}{index[n.split('.')[1]]}.{n.split('.')[2]}": torch.from_numpy(v * 2) for n, v in found.items()}


def with_bridge(hf: Tensors) -> Tensors:
    return {n: (v * 2 if n.startswith("multi_modal_projector.") else v) for n, v in hf.items()}


def expected(hf: Tensors, *modules: str) -> Tensors:
    base = with_bridge(hf)
    return base | {f"{m}.weight": merged(base[f"{m}.weight"], *pair(hf, m), 2) for m in modules}


def old_rows(out: Path, want: Tensors) -> None:
    """As `check`, but for rows of the vocabulary, which an official model does not have."""
    found = load(out)
    assert found.keys() == want.keys()
    for name, value in want.items():
        rows = min(len(found[name]), len(value)) - (64 if "embed_tokens" in name or "lm_head" in name else 0)
        assert np.array_equal(found[name][:rows], value[:rows]), name


def test_a_lora_over_a_whole_llava(official: Path, hf: Tensors, tmp_path: Path) -> None:
    llava_convert.convert(official, to="hf", out=tmp_path / "out", verify="full")
    old_rows(tmp_path / "out", expected(hf, Q, FC1, LINEAR))


def test_without_its_projector(official: Path, hf: Tensors, tmp_path: Path) -> None:
    (official / "non_lora_trainables.bin").unlink()
    adapter = official / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(adapter).items() if "mm_projector" not in name}
    adapter.unlink()
    save_file(kept, adapter, {"format": "pt"})
    report = llava_convert.convert(official, to="hf", out=tmp_path / "base")
    assert any("has no projector, and that of its base is taken" in told for told in report.warnings)
    for step in (2, 10):
        file = tmp_path / "stage1" / "mm_projector" / f"checkpoint-{step}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({n: v * (1 if step == 10 else 2) for n, v in bridge(hf, "model.mm_projector.").items()}, file)
    llava_convert.convert(official, to="hf", out=tmp_path / "out", projector=tmp_path / "stage1")
    old_rows(tmp_path / "out", expected(hf, Q, FC1))
    with pytest.raises(UsageError, match="has a projector"):
        llava_convert.convert(tmp_path / "base", to="official", out=tmp_path / "o", projector=tmp_path / "stage1")


def test_a_missing_projector_says_how_it_is_given(models: Models, official: Path, tiny: Path, tmp_path: Path) -> None:
    (official / "non_lora_trainables.bin").unlink()
    with pytest.raises(InputError, match="there is no projector") as refused:
        llava_convert.convert(
            official, to="hf", out=tmp_path / "o", llm=str(tiny / "llm"), visual_encoder=str(models.tower)
        )
    assert "projector" in str(refused.value.hint)


def test_what_zero_to_fp32_makes_of_it(models: Models, official: Path, hf: Tensors, tmp_path: Path) -> None:
    """One file with peft's live names beside the adapter, and no config."""
    whole = load_file(models["official"] / "model.safetensors")
    adapter = load_file(official / "adapter_model.safetensors")
    adapted = {name.rpartition(".lora_")[0] for name in adapter}
    state = {}
    for name, value in whole.items():
        if "mm_projector" in name:
            continue
        module, _, param = f"base_model.model.{name}".rpartition(".")
        state[f"{module}.base_layer.{param}" if module in adapted else f"{module}.{param}"] = torch.from_numpy(value)
    state |= bridge(hf, "base_model.model.model.mm_projector.")
    state |= {n.replace(".weight", ".default.weight"): torch.from_numpy(v) for n, v in adapter.items()}
    source = tmp_path / "fp32"
    source.mkdir()
    torch.save(state, source / "pytorch_model.bin")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(official / file, source / file)
    llava_convert.convert(source, to="hf", out=tmp_path / "out", dtype="float16", base=str(models["official"]))
    old_rows(tmp_path / "out", expected(hf, Q, FC1, LINEAR))


def test_half_way_through_a_training(official: Path, hf: Tensors, tmp_path: Path) -> None:
    """`checkpoint-50` without the projector, which DeepSpeed's folder has, and without a config, which the run has."""
    checkpoint = official / "checkpoint-50"
    checkpoint.mkdir()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.move(official / file, checkpoint / file)
    (official / "non_lora_trainables.bin").unlink()
    trained = bridge(hf, "base_model.model.model.mm_projector.")
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    trained |= {n.replace(".weight", ".default.weight"): torch.from_numpy(v) for n, v in adapter.items()}
    write_zero2(checkpoint / "global_step50", trained)
    (checkpoint / "latest").write_text("global_step50")
    report = llava_convert.convert(official, to="hf", out=tmp_path / "out")
    assert any("checkpoint-50 is taken" in note for note in report.notes)
    assert any("config.json is that of the run" in note for note in report.notes)
    old_rows(tmp_path / "out", expected(hf, Q, FC1, LINEAR))


def test_half_way_without_deepspeed(official: Path, models: Models, hf: Tensors, tiny: Path, tmp_path: Path) -> None:
    """The run's config says that it is a LLaVA's; over a language model, the rest is not left out in silence."""
    checkpoint = official / "checkpoint-50"
    checkpoint.mkdir()
    base = {"base_model_name_or_path": str(tiny / "llm")}
    text = {n: v for n, v in load_file(official / "adapter_model.safetensors").items() if ".model.layers." in n}
    save_file(text, checkpoint / "adapter_model.safetensors")
    adapter = json.loads((official / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter | base))
    edit(official, _name_or_path=base["base_model_name_or_path"], mm_vision_tower=str(models.tower))
    found = llava_convert.inspect(checkpoint)
    assert found.layout == "official" and "the run's config.json" in found.why
    with pytest.raises(InputError, match="there is no projector"):
        llava_convert.convert(checkpoint, to="hf", out=tmp_path / "out")
    given = official / "non_lora_trainables.bin"
    llava_convert.convert(checkpoint, to="hf", out=tmp_path / "out", projector=given, dtype="float32")
    linear = "multi_modal_projector.linear_1.weight"
    assert np.array_equal(load(tmp_path / "out")[linear], with_bridge(hf)[linear].astype(np.float32))
    edit(official, _name_or_path="lmsys/vicuna-7b-v1.5")  # a folder around it of another model
    assert llava_convert.inspect(checkpoint).layout == "peft"


def test_a_base_of_one_part_alone(models: Models, official: Path, hf: Tensors, tiny: Path, tmp_path: Path) -> None:
    """An adapter of more parts is refused with counts; official LLaVA's is a LLaVA, whatever it was laid over."""
    source = write_adapter(tmp_path / "adapter", models["hf"], lora(hf, {Q: Q, FC1: FC1, LINEAR: LINEAR}))
    for base in (tiny / "llm", tiny / "vit"):
        with pytest.raises(UnsupportedError, match=r"3 modules, but 1 of the .*, 1 of the .* are not in the base"):
            llava_convert.convert(source, to="hf", out=tmp_path / "out", base=str(base))
        with pytest.raises(UnsupportedError, match="are not in the base"):
            llava_convert.merge(base, adapter=[source], out=tmp_path / "out")
    text = write_adapter(tmp_path / "text", models["hf"], lora(hf, {Q: Q}))
    llava_convert.convert(text, to="hf", out=tmp_path / "llm", base=str(tiny / "llm"))
    edit(official, mm_vision_tower=str(models.tower))
    kept = {n: v for n, v in load_file(official / "adapter_model.safetensors").items() if ".vision_tower." not in n}
    (official / "adapter_model.safetensors").unlink()
    save_file(kept, official / "adapter_model.safetensors")
    llava_convert.convert(official, to="hf", out=tmp_path / "whole", dtype="float16", base=str(tiny / "llm"))
    found = load(tmp_path / "whole")
    assert found.keys() == hf.keys() and np.array_equal(found[f"{LINEAR}.bias"], with_bridge(hf)[f"{LINEAR}.bias"])


def test_the_bases_of_a_base_lie_beside_it(models: Models, hf: Tensors, tiny: Path, tmp_path: Path) -> None:
    """Where a training names them by folders; the adapter is elsewhere."""
    source = write_adapter(tmp_path / "adapter", "gone", lora(hf, {FC1: FC1}))
    elsewhere = shutil.copytree(tiny, tmp_path / "elsewhere" / "tiny")
    llava_convert.convert(source, to="hf", out=tmp_path / "out", base=str(elsewhere / "iter_2.pth"))
    assert not np.array_equal(load(tmp_path / "out")[f"{FC1}.weight"], hf[f"{FC1}.weight"])
    assert str(tmp_path) not in (tmp_path / "out" / "conversion.json").read_text()


def test_the_projector_of_an_adapter_alone(models: Models, hf: Tensors, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter", models["hf"], lora(hf, {Q: Q, LINEAR: LINEAR}))
    llava_convert.convert(source, to="peft", out=tmp_path / "part", part="projector")
    llava_convert.convert(tmp_path / "part", to="hf", out=tmp_path / "out", base=str(models["hf"]))
    weight = f"{LINEAR}.weight"
    check(tmp_path / "out", hf, {weight: merged(hf[weight], *pair(hf, LINEAR), ALPHA / RANK)})


def write_zero2(folder: Path, trained: dict[str, torch.Tensor]) -> None:
    """What one rank of ZeRO-2 leaves (deepspeed 0.14.4, runtime/engine.py `_save_checkpoint`)."""
    folder.mkdir()
    flat = torch.cat([value.float().reshape(-1) for value in trained.values()])
    flat = torch.nn.functional.pad(flat, (0, len(flat) % 2))
    model = {
        "module": trained,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: value.shape for name, value in trained.items()}],
        "frozen_param_shapes": {},
        "shared_params": {},
        "frozen_param_fragments": {},
        "global_steps": 50,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 2}},
        "ds_version": "0.14.4",
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    optimizer = {
        "zero_stage": 2,
        "overflow": False,
        "base_optimizer_state": {"state": {}, "param_groups": []},
        "single_partition_of_fp32_groups": [flat],
        "group_paddings": [0],
        "partition_count": [1],
    }
    torch.save(
        {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": "0.14.4"},
        folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    )


def test_weights_of_another_name(models: Models, hf: Tensors, tmp_path: Path) -> None:
    source = models.copy("official", tmp_path / "official")
    state = {n: torch.from_numpy(v) for n, v in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    torch.save(state, source / "model_state_dict.bin")
    llava_convert.convert(source, to="hf", out=tmp_path / "out")
    old_rows(tmp_path / "out", hf)


@pytest.mark.parametrize("layout", ["hf", "official", "xtuner", "gguf"])
def test_the_part_of_a_whole_model_is_a_base(models: Models, hf: Tensors, tmp_path: Path, layout: str) -> None:
    torch.save(bridge(hf, "model.mm_projector."), tmp_path / "mm_projector.bin")
    base = models[layout]
    if layout == "gguf":
        base = tmp_path / "f16"
        llava_convert.convert(models["hf"], to="gguf", out=base, outtype="f16", mmproj_outtype="f16")
    llava_convert.convert(
        tmp_path / "mm_projector.bin", to="hf", out=tmp_path / "out", llm=str(base), visual_encoder=str(models["hf"])
    )
    want = with_bridge(hf)
    found = load(tmp_path / "out")
    # A GGUF never has the tower's last norm, which LLaVA does not read.
    unread = {n for n in want if layout == "gguf" and "post_layernorm" in n}
    old_rows(tmp_path / "out", {n: found[n] if n in unread else v for n, v in want.items()})
