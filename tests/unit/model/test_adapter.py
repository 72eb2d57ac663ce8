"""Adapters: found by name, scaled as peft scales them, merged into the weights that peft's own merge gives."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import llava_convert
from llava_convert.app.options import SourceOptions
from llava_convert.core.errors import InputError, UnsupportedError, UsageError
from llava_convert.core.tensors import Extent, StoredTensor
from llava_convert.engine.plan import make_plan
from llava_convert.engine.run import Outcome, run_task
from llava_convert.engine.tasks import tasks_of
from llava_convert.model.adapter import Adapter, disputed, parse_adapter, settings_for, settings_from_json
from llava_convert.model.recipe import Recipe
from llava_convert.model.target import FileSet, Output, Target
from llava_convert.model.training import LoraSettings
from llava_convert.storage.ranges import FilePool
from llava_convert.storage.safetensors import read_header
from llava_convert.storage.streams import read_whole
from llava_convert.storage.torch.file import read_torch, state_dict

PART = "language_model"


def stored(name: str, *shape: int) -> StoredTensor:
    return StoredTensor(name, "F32", shape, (Extent(Path("x"), 0, 4 * math.prod(shape)),))


def pair(module: str, rank: int = 4, *, rows: int = 8, columns: int = 6, live: bool = False) -> dict[str, StoredTensor]:
    middle = ".default" if live else ""
    return {
        f"{PART}.{module}.lora_A{middle}.weight": stored("a", rank, columns),
        f"{PART}.{module}.lora_B{middle}.weight": stored("b", rows, rank),
    }


def adapter(*modules: str, settings: LoraSettings | None = None, ranks: Mapping[str, int] | None = None) -> Adapter:
    tensors: dict[str, StoredTensor] = {}
    for module in modules:
        tensors |= pair(module, (ranks or {}).get(module, settings.r if settings else 4))
    return parse_adapter(tensors, settings, "test")[0]


# --- against peft's own merge


class Block(torch.nn.Module):
    """Linear layers at paths as deep as a model's, so that patterns have something to match."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"q_proj": torch.nn.Linear(48, 64, bias=False), "mlp": torch.nn.Linear(48, 96)})
            for _ in range(3)
        )


def peft_case(tmp_path: Path, **config: Any) -> tuple[Any, dict[str, torch.Tensor], Path]:
    """A model under peft with random adapters; its base weights, and the adapter saved as peft saves it."""
    torch.manual_seed(5)
    model = Block()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "mlp"], **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
            elif "magnitude" in name:
                parameter.mul_(1.5)
    wrapped.save_pretrained(tmp_path)
    save_file(base, tmp_path / "base.safetensors")
    return wrapped, base, tmp_path


def our_merge(folder: Path, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every weight of `base` with the saved adapter merged, by the package's own files, names and blocks."""
    config = folder / "adapter_config.json"
    raw = read_header(folder / "adapter_model.safetensors").tensors
    named = {f"{PART}.{name.removeprefix('base_model.model.')}": tensor for name, tensor in raw.items()}
    parsed, dropped = parse_adapter(named, settings_from_json(json.loads(config.read_text()), config), str(folder))
    assert not dropped and len(parsed.modules) == 6 and not disputed(parsed)
    recipes = {}
    for name, tensor in read_header(folder / "base.safetensors").tensors.items():
        op = parsed.merge_op(f"{PART}.{name}")
        assert (op is None) == name.endswith("bias")
        recipes[name] = Recipe(tensor) if op is None else Recipe(tensor).then(op)
    outputs = tuple(Output(name, name, recipe, "F32") for name, recipe in recipes.items())
    (shard,) = make_plan(Target("x", (FileSet(outputs),), {})).shards
    found: dict[str, bytearray] = {t.name: bytearray(t.nbytes) for t in shard.tensors}

    class Sink:
        def copy(self, task: Any) -> None:
            raise AssertionError

        def put(self, tensor: Any, start: int, data: Any) -> None:
            found[tensor.name][start : start + data.nbytes] = data.tobytes()

    with FilePool() as pool:
        for task in tasks_of(shard.tensors, whole=True):
            run_task(task, pool, Sink(), Outcome())
    return {name: torch.frombuffer(found[name], dtype=torch.float32).reshape(base[name].shape) for name in found}


@pytest.mark.parametrize(
    "config",
    [
        {"r": 8, "lora_alpha": 16},
        {"r": 6, "lora_alpha": 5},
        {"r": 8, "lora_alpha": 16, "use_rslora": True},
        {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}},
        {"r": 8, "lora_alpha": 16, "alpha_pattern": {"layers.1.mlp": 3}},
        {"r": 8, "lora_alpha": 16, "rank_pattern": {"layers.[01].mlp": 2}, "alpha_pattern": {"q_proj": 7}},
        {"r": 8, "lora_alpha": 16, "rank_pattern": {"mlp": 2}, "alpha_pattern": {"mlp": 7}, "use_rslora": True},
    ],
    ids=lambda config: "-".join(f"{k}={v}" for k, v in config.items()),
)
def test_against_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    """Bit for bit what peft's merge_and_unload gives in float64, rounded to float32."""
    wrapped, base, folder = peft_case(tmp_path, **config)
    merged = {name: theirs.float() for name, theirs in wrapped.double().merge_and_unload().state_dict().items()}
    ours = our_merge(folder, base)
    assert sorted(ours) == sorted(merged)
    for name, theirs in merged.items():
        assert torch.equal(ours[name], theirs), name
        assert torch.equal(theirs, base[name]) == name.endswith("bias")


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_against_peft(tmp_path: Path, rslora: bool) -> None:
    wrapped, base, folder = peft_case(tmp_path, r=8, lora_alpha=16, use_dora=True, use_rslora=rslora)
    merged = {name: theirs.float() for name, theirs in wrapped.double().merge_and_unload().state_dict().items()}
    ours = our_merge(folder, base)
    for name, theirs in merged.items():
        assert torch.allclose(ours[name], theirs, rtol=2e-7, atol=0), name
        assert torch.allclose(theirs, base[name]) == name.endswith("bias")


def test_modules_to_save_against_peft(tmp_path: Path) -> None:
    """A module that was trained whole beside the adapter replaces the base's."""
    torch.manual_seed(5)
    wrapped = get_peft_model(Block(), LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.0.mlp"]))
    wrapped.save_pretrained(tmp_path)
    raw = read_header(tmp_path / "adapter_model.safetensors").tensors
    named = {f"{PART}.{name.removeprefix('base_model.model.')}": tensor for name, tensor in raw.items()}
    parsed, _ = parse_adapter(named, None, "test")
    assert sorted(parsed.overrides) == [f"{PART}.layers.0.mlp.bias", f"{PART}.layers.0.mlp.weight"]
    # What a state_dict() of the model under training holds means the same.
    live = {
        f"{PART}.{name.removeprefix('base_model.model.')}": stored(name, *tensor.shape)
        for name, tensor in wrapped.state_dict().items()
        if "lora_" in name or "layers.0.mlp" in name
    }
    parsed, dropped = parse_adapter(live, None, "test")
    assert sorted(parsed.overrides) == [f"{PART}.layers.0.mlp.bias", f"{PART}.layers.0.mlp.weight"]
    assert all("modules_to_save.default" in tensor.name for tensor in parsed.overrides.values())
    assert sorted(dropped) == [f"{PART}.layers.0.mlp.original_module.{kind}" for kind in ("bias", "weight")]
    assert all("frozen copy" in reason for reason in dropped.values())


# --- patterns


def peft_0_12(settings: LoraSettings, path: str) -> tuple[int, float]:
    """peft 0.12, LoraModel._create_and_replace: one key for both lookups."""
    keys = itertools.chain(settings.rank_pattern, settings.alpha_pattern)
    key = next((k for k in keys if re.match(rf".*\.{k}$", path)), path)
    return settings.rank_pattern.get(key, settings.r), settings.alpha_pattern.get(key, settings.lora_alpha)


PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"]


@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({}, {}),
        ({"q_proj": 2}, {}),
        ({}, {"up_proj": 3}),
        ({"q_proj": 2}, {"q_proj": 3}),
        ({"layers.1.mlp.up_proj": 2}, {"up_proj": 3}),
        ({"up_proj": 2, "mlp.up_proj": 1}, {"mlp.up_proj": 3}),
        ({r"layers\.\d+\.mlp\.up_proj": 2}, {r"layers\.1\.mlp\.up_proj": 3}),
        ({"model.layers.1.mlp.up_proj": 2}, {"lm_head": 5}),
        ({"proj": 2}, {"head": 3}),
    ],
)
def test_patterns_against_peft_0_12(ranks: dict[str, int], alphas: dict[str, float]) -> None:
    settings = LoraSettings(r=8, lora_alpha=16, rank_pattern=ranks, alpha_pattern=alphas)
    for path in PATHS:
        assert settings_for(settings, f"{PART}.{path}") == peft_0_12(settings, path)


def test_two_keys_for_one_module_are_disputed() -> None:
    """peft 0.12 keeps the common alpha where a rank key matched first; later versions take the alpha key."""
    first, second = "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"
    settings = LoraSettings(r=8, lora_alpha=16, rank_pattern={"layers.1.mlp.up_proj": 2}, alpha_pattern={"up_proj": 3})
    found = adapter(first, second, settings=settings, ranks={second: 2})
    assert disputed(found) == [f"{PART}.{second}"]
    assert found.scale(f"{PART}.{first}") == 3 / 8
    assert found.scale(f"{PART}.{second}") == 16 / 2
    one_key = LoraSettings(r=8, lora_alpha=16, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 3})
    assert disputed(adapter(first, settings=one_key, ranks={first: 2})) == []


@pytest.mark.parametrize(
    "key", ["(a+)+", "(a|aa)*b", "(.*)+x", "a*b*c*d*e*", ".*.*.*!", "x" * 201, "(a{1,9}){1,9}", "((a)*)"]
)
@pytest.mark.parametrize("where", ["rank_pattern", "alpha_pattern"])
def test_keys_that_could_match_for_ever_are_refused(key: str, where: str) -> None:
    patterns: dict[str, Any] = {where: {key: 2}}
    with pytest.raises(UnsupportedError, match="too complex") as caught:
        settings_for(LoraSettings(**patterns), f"{PART}.layers.0.{'a' * 40}")
    assert len(str(caught.value)) < 200


def test_a_key_of_two_quantifiers_is_taken() -> None:
    settings = LoraSettings(r=8, rank_pattern={r"layers\.\d+\.mlp\..*_proj": 2})
    assert settings_for(settings, f"{PART}.layers.12.mlp.up_proj")[0] == 2
    assert settings_for(settings, f"{PART}.layers.12.self_attn.q_proj")[0] == 8


def test_a_key_that_is_no_expression() -> None:
    with pytest.raises(InputError, match="not a regular expression"):
        settings_for(LoraSettings(rank_pattern={"[": 2}), f"{PART}.x")


# --- scale


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_scale(rslora: bool, scale: float) -> None:
    settings = LoraSettings(r=4, lora_alpha=16, use_rslora=rslora)
    found = adapter("layers.0.q", settings=settings)
    assert found.scale(f"{PART}.layers.0.q") == scale
    op = found.merge_op(f"{PART}.layers.0.q.weight")
    assert op is not None and op.scale == scale
    assert found.merge_op(f"{PART}.layers.0.q.bias") is None
    assert found.merge_op(f"{PART}.layers.1.q.weight") is None


def test_rank_of_config_and_weights_must_agree() -> None:
    found = adapter("layers.0.q", settings=LoraSettings(r=4), ranks={"layers.0.q": 2})
    with pytest.raises(InputError, match="the config says r = 4, the weights have r = 2"):
        found.scale(f"{PART}.layers.0.q")


@pytest.mark.parametrize("settings", [None, LoraSettings(r=4, lora_alpha=math.nan)])
def test_unknown_alpha_asks_for_the_option(settings: LoraSettings | None) -> None:
    found = adapter("layers.0.q", settings=settings)
    with pytest.raises(UnsupportedError, match=r"alpha of the LoRA \(rank 4\) is not known") as caught:
        found.scale(f"{PART}.layers.0.q")
    assert caught.value.hint is not None and "--lora-alpha" in caught.value.hint
    assert found.scale(f"{PART}.layers.0.q", alpha=6) == 1.5


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, {}),
        ("16", {"llm": 16.0, "visual-encoder": 16.0}),
        ("llm=256", {"llm": 256.0}),
        ("llm=256, visual-encoder=1.5", {"llm": 256.0, "visual-encoder": 1.5}),
    ],
)
def test_lora_alpha_option(text: str | None, found: dict[str, float]) -> None:
    assert SourceOptions(lora_alpha=text).bases.lora_alpha == found


@pytest.mark.parametrize(
    "text", ["", "x", "llm", "llm=x", "vit=3", "llm=1=2", "llm=-1", "llm=nan", "0", "-5", "nan", "inf"]
)
def test_bad_lora_alpha(text: str) -> None:
    with pytest.raises(UsageError, match="--lora-alpha"):
        SourceOptions(lora_alpha=text)


# --- what adapters are made of


@pytest.mark.parametrize("live", [False, True])
def test_both_spellings(live: bool) -> None:
    found, dropped = parse_adapter(pair("layers.0.q", live=live), None, "test")
    assert list(found.modules) == [f"{PART}.layers.0.q"]
    assert list(found.tensors) == [f"{PART}.layers.0.q.lora_{side}.weight" for side in "AB"]
    assert (found.modules[f"{PART}.layers.0.q"].rank, dropped, found.overrides) == (4, {}, {})


def test_base_layer_under_training_is_the_weight() -> None:
    tensors = pair("lm_head", live=True) | {f"{PART}.lm_head.base_layer.weight": stored("w", 8, 6)}
    found, _ = parse_adapter(tensors, None, "test")
    assert list(found.overrides) == [f"{PART}.lm_head.weight"]


@pytest.mark.parametrize("side", ["A", "B"])
def test_half_an_adapter(side: str) -> None:
    tensors = pair("layers.0.q") | pair("layers.1.q")
    del tensors[f"{PART}.layers.1.q.lora_{side}.weight"]
    with pytest.raises(
        InputError, match=rf"LoRA of {PART}\.layers\.1\.q has only \.lora_{'B' if side == 'A' else 'A'}"
    ):
        parse_adapter(tensors, None, "test")


@pytest.mark.parametrize(("a", "b"), [((4, 6), (8, 3)), ((0, 6), (8, 0)), ((), (8, 4)), ((4, 6), (8,))])
def test_sides_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    tensors = {f"{PART}.q.lora_A.weight": stored("a", *a), f"{PART}.q.lora_B.weight": stored("b", *b)}
    with pytest.raises(InputError, match=r"A is .* and B is"):
        parse_adapter(tensors, None, "test")


@pytest.mark.parametrize("tail", ["lora_ga.default", "lora_A.second.weight", "lora_E"])
def test_other_kinds_of_adapter_are_refused(tail: str) -> None:
    with pytest.raises(UnsupportedError, match="a kind of adapter that cannot be merged"):
        parse_adapter({f"{PART}.q.{tail}": stored("x", 2, 2)}, None, "test")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"peft_type": "ADALORA"}, "type ADALORA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_16"}, "PiSSA"),
    ],
)
def test_settings_that_cannot_be_merged(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        settings = settings_from_json({"r": 4, "lora_alpha": 8, **raw}, Path("adapter_config.json"))
        parse_adapter(pair("q"), settings, "test")


def test_settings_against_peft(tmp_path: Path) -> None:
    """What peft writes is what is read, field by field."""
    made = LoraConfig(
        r=6, lora_alpha=5, use_rslora=True, rank_pattern={"q": 2}, alpha_pattern={"v": 3}, bias="none",
        target_modules=["q", "v"], modules_to_save=["head"], task_type="CAUSAL_LM",
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    found = settings_from_json(json.loads(file.read_text()), file)
    assert isinstance(found.target_modules, tuple)
    assert (found.r, found.lora_alpha, found.use_rslora, found.use_dora) == (6, 5, True, False)
    assert (found.rank_pattern, found.alpha_pattern) == ({"q": 2}, {"v": 3})
    assert (sorted(found.target_modules), found.modules_to_save) == (["q", "v"], ("head",))
    assert (found.peft_type, found.bias) == ("LORA", "none")


def test_rank_one_is_a_rank() -> None:
    settings = settings_from_json({"r": 1, "lora_alpha": 3}, Path("adapter_config.json"))
    found = adapter("q", settings=settings)
    assert (settings.r, found.modules[f"{PART}.q"].rank, found.scale(f"{PART}.q")) == (1, 1, 3.0)
    with pytest.raises(InputError, match="LoRA of"):
        parse_adapter(pair("q", 0), settings, "test")


def test_rank_zero_adapts_nothing() -> None:
    with pytest.raises(UnsupportedError, match="r = 0 adapts nothing"):
        settings_from_json({"r": 0, "lora_alpha": 8}, Path("adapter_config.json"))


@pytest.mark.parametrize("rank", [None, -1, "8", 2.0, False, True])
def test_rank_must_be_a_count(rank: Any) -> None:
    with pytest.raises(InputError, match="r should be a count"):
        settings_from_json({"r": rank, "lora_alpha": 8}, Path("adapter_config.json"))


def test_alpha_may_be_missing_from_the_file() -> None:
    assert math.isnan(settings_from_json({"r": 8}, Path("x")).lora_alpha)


# --- the whole way: a checkpoint that says nothing of its alpha


def test_lora_alpha_from_checkpoint_to_output(tiny: Path, tmp_path: Path) -> None:
    """Without a config the bases are named and alpha is asked for; given, the bits are those of the config's alpha."""
    bare = tmp_path / "bare.pth"
    with FilePool() as pool:
        held = state_dict(read_torch(tiny / "iter_2.pth")).tensors
        torch.save({name: torch.from_numpy(read_whole(pool, tensor).copy()) for name, tensor in held.items()}, bare)
    bases = {"llm": str(tiny / "llm"), "visual_encoder": str(tiny / "vit")}
    with pytest.raises(UnsupportedError, match="alpha of the LoRA") as caught:
        llava_convert.convert(bare, to="official", out=tmp_path / "no", **bases)
    assert caught.value.exit_code == 4 and "by lora_alpha" in str(caught.value.hint)
    assert not (tmp_path / "no").exists()
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "told")
    llava_convert.convert(bare, to="official", out=tmp_path / "asked", lora_alpha={"visual-encoder": 16}, **bases)
    llava_convert.convert(bare, to="official", out=tmp_path / "other", lora_alpha=17, **bases)
    told, asked, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("told", "asked", "other"))
    assert asked == told
    assert other != told


def test_patterns_are_looked_up_apart_from_peft_0_14_on() -> None:
    """huggingface/peft#2195: a rank key and another alpha key that match one module both count."""
    raw = {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\.q_proj": 5}}
    path = "model.layers.0.q_proj"
    assert settings_for(settings_from_json(raw, Path("x")), path) == (2, 16)
    assert settings_for(settings_from_json({**raw, "lora_bias": False}, Path("x")), path) == (2, 5)
