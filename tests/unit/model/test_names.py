"""Layout tables: patterns work both ways, and what they call a tensor is what the real tools call it."""

from __future__ import annotations

import re
import time
from pathlib import Path, PurePath
from typing import Any

import pytest

from llava_convert.core.errors import UnsupportedError
from llava_convert.core.resources import data_dir
from llava_convert.core.tensors import StoredTensor
from llava_convert.core.text import printable
from llava_convert.model.recipe import Recipe
from llava_convert.model.renaming import renamed
from llava_convert.model.tables.families import architecture_for, architectures
from llava_convert.model.tables.names import CANONICAL, grouped, layout_table, lookup_errors, parse_layout_table
from llava_convert.model.tables.patterns import Pattern, TableError

SHIPPED = sorted(path.stem for path in (data_dir("mappings") / "layouts").glob("*.toml"))
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "intermediate_size": 4, "image_size": 28, "patch_size": 14, "num_channels": 3}
PROJECTOR = {"text_hidden_size": 8, "vision_hidden_size": 4, "steps": 1, "bias": True}

WHOLE = ("pth", "xtuner", "official", "hf")


def canonical_names(family: str, model_type: str, **config: Any) -> list[str]:
    table = architecture_for(architectures()[family].part, model_type)
    return list(table.tensors(table.complete({**SMALL, **PROJECTOR, "model_type": model_type, **config})))


def every_family() -> list[tuple[str, str]]:
    return [(table.name, kind) for table in architectures().values() for kind in table.model_types]


def tiny_llava(layout: str) -> set[str]:
    """Disk names of a Llama of 2 layers with a CLIP of 3 and a projector, as the layout's table writes them."""
    names = canonical_names("llama", "llama") + canonical_names("clip", "clip_vision_model", num_hidden_layers=3)
    written = [layout_table(layout).write(name) for name in names + canonical_names("mlp", "projector")]
    assert None not in written
    return {found[0] for found in written if found is not None}


# --- patterns


@pytest.mark.parametrize(
    ("pattern", "name", "bindings"),
    [
        ("a.b", "a.b", {}),
        ("a.{x}.c", "a.7.c", {"{x}": "7"}),
        ("a.{x...}", "a.b.c", {"{x*}": "b.c"}),
        ("{x...}.weight", "a.b.weight", {"{x*}": "a.b"}),
        ("{x...}.lora.{y}.w", "a.b.lora.q.w", {"{x*}": "a.b", "{y}": "q"}),
        ("root/model.{x...}", "root/model.norm", {"{x*}": "norm"}),
    ],
)
def test_match_and_fill(pattern: str, name: str, bindings: dict[str, str]) -> None:
    parsed = Pattern.parse(pattern)
    assert parsed.match(name) == bindings
    assert parsed.fill(bindings) == name


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("a.b", "a.b.c"),
        ("a.b", "a"),
        ("a.{x}", "a.b.c"),
        ("a.{x...}", "a"),
        ("{x...}.weight", "weight"),
        ("{x...}.weight", "a.bias"),
        ("a.{x...}.b.c", "a.b.c"),
        ("language_model.model.{x...}", "language_model.models.norm"),
    ],
)
def test_no_match(pattern: str, name: str) -> None:
    assert Pattern.parse(pattern).match(name) is None


@pytest.mark.parametrize("bad", ["", "a..b", "{x...}.{y...}", "{x}.a.{x}", "a.", ".a"])
def test_bad_patterns_are_refused(bad: str) -> None:
    with pytest.raises(TableError):
        Pattern.parse(bad)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("a.{x}", "a.b", True),
        ("a.{x...}", "a.b.c", True),
        ("a.{x...}", "{y...}.c", True),
        ("a.{x...}.b", "a.{y...}.c", False),
        ("{x...}.c.d", "m.{y...}.d", True),
        ("a.{x}", "a.b.c", False),
        ("a.{x...}", "a", False),
        ("model.{x...}", "model.vision_tower.{x...}", True),
        ("m.{x...}.w", "{y...}.w.b", False),
    ],
)
def test_overlap(one: str, other: str, both: bool) -> None:
    a, b = Pattern.parse(one), Pattern.parse(other)
    assert (a.overlaps(b), b.overlaps(a)) == (both, both)


# --- tables

HEAD = 'layout = "x"\nwrites = "x"\n'


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{ disk = "a.{x}", canonical = "b.{y}" }', "different placeholders"),
        ('{ disk = "a.{x...}", canonical = "b.{x...}" }, { disk = "a.c", canonical = "d" }', "can match the same name"),
        ('{ disk = "a", canonical = "c.{x}" }', "different placeholders"),
        ('{ disk = "a.{x}", canonical = "c.{x}" }, { disk = "b.{x}", canonical = "c.{x}" }', "can match the same name"),
    ],
)
def test_contradictions_are_refused_at_load(rows: str, message: str) -> None:
    with pytest.raises(TableError, match=message):
        parse_layout_table(f"{HEAD}row = [{rows}]", Path("x.toml"))


def test_a_drop_that_overlaps_a_row_is_refused() -> None:
    text = f'{HEAD}row = [{{ disk = "a.{{x}}", canonical = "b.{{x}}" }}]\ndrop = [{{ disk = "a.b", reason = "r" }}]'
    with pytest.raises(TableError, match="can match the same name"):
        parse_layout_table(text, Path("x.toml"))


def test_two_dialects_may_mean_the_same_and_one_is_written() -> None:
    rows = '{ disk = "a.{x}", canonical = "c.{x}" }, { dialect = "old", disk = "b.{x}", canonical = "c.{x}" }'
    table = parse_layout_table(f"{HEAD}row = [{rows}]", Path("x.toml"))
    new, old = table.read("a.1"), table.read("b.1")
    assert new is not None and old is not None
    assert (new.canonical, new.dialect, old.canonical, old.dialect) == ("c.1", "x", "c.1", "old")
    assert table.write("c.1") == ("a.1", 0)
    assert [row.line for row in table.rows] == [3, 3]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tables_load(name: str) -> None:
    table = layout_table(name)
    assert table.name == name
    assert all(row.line > 0 for row in table.rows), "an error could not name the row's line"
    assert all(drop.reason for drop in table.drops)
    assert {row.dialect for row in table.rows} >= {table.writes}


@pytest.mark.parametrize("family", every_family(), ids="-".join)
@pytest.mark.parametrize("layout", WHOLE)
def test_written_names_read_back(layout: str, family: tuple[str, str]) -> None:
    """read(write(name)) == name for every tensor of every family, with every optional one present."""
    table = layout_table(layout)
    names = canonical_names(*family, attention_bias=True, mlp_bias=True, vision_use_head=True)
    seen: dict[str, str] = {}
    for name in names:
        found = table.write(name)
        assert found is not None, name
        disk, place = found
        assert seen.setdefault(disk, name) == name
        named = table.read(disk)
        assert named is not None
        assert (named.canonical, named.dialect) == (name, table.writes)
        assert any(row.place == place and row.disk.match(disk) is not None for row in table.rows)
    assert len(seen) == len(names) > 3


@pytest.mark.parametrize("family", [f for f in every_family() if f[0] != "mlp"], ids="-".join)
def test_single_parts_read_back(family: tuple[str, str]) -> None:
    table = layout_table("parts")
    for name in canonical_names(*family, attention_bias=True, mlp_bias=True, vision_use_head=True):
        found = table.write(name)
        assert found is not None, name
        named = table.read(found[0])
        assert named is not None and named.canonical == name


# --- what the real tools call them. Frozen from xtuner 0.1.23's own outputs of a model of this size.

LLAMA_LAYER = [
    *(f"self_attn.{kind}_proj" for kind in "kvqo"),
    *(f"mlp.{kind}_proj" for kind in ("down", "gate", "up")),
    *("input_layernorm", "post_attention_layernorm"),
]
CLIP_LAYER = [
    *(f"self_attn.{kind}_proj" for kind in ("k", "v", "q", "out")),
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
]
LLAMA = ["embed_tokens.weight", "norm.weight", *(f"layers.{i}.{m}.weight" for i in range(2) for m in LLAMA_LAYER)]
CLIP = [
    *("embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"),
    *(f"{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")),
    *(f"encoder.layers.{i}.{m}.{kind}" for i in range(3) for m in CLIP_LAYER for kind in ("weight", "bias")),
]
LINEAR = ["weight", "bias"]
FROZEN = {
    "official": {
        *(f"model.{name}" for name in LLAMA),
        "lm_head.weight",
        *(f"model.vision_tower.vision_tower.vision_model.{name}" for name in CLIP),
        *(f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in LINEAR),
    },
    "hf": {
        *(f"language_model.model.{name}" for name in LLAMA),
        "language_model.lm_head.weight",
        *(f"vision_tower.vision_model.{name}" for name in CLIP),
        *(f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in LINEAR),
    },
    "xtuner": {
        *(f"root/model.{name}" for name in LLAMA),
        "root/lm_head.weight",
        *(f"visual_encoder/vision_model.{name}" for name in CLIP),
        *(f"projector/model.{i}.{kind}" for i in (0, 2) for kind in LINEAR),
    },
    "pth": {
        *(f"llm.model.{name}" for name in LLAMA),
        "llm.lm_head.weight",
        *(f"visual_encoder.vision_model.{name}" for name in CLIP),
        *(f"projector.model.{i}.{kind}" for i in (0, 2) for kind in LINEAR),
    },
}


@pytest.mark.parametrize("layout", FROZEN)
def test_names_are_the_frozen_ones(layout: str) -> None:
    assert len(FROZEN[layout]) == 80
    assert tiny_llava(layout) == FROZEN[layout]


@pytest.mark.parametrize("layout", ["official", "hf", "xtuner"])
def test_against_xtuner(golden: Path, layout: str) -> None:
    """The frozen lists are those of the real converter's outputs."""
    from safetensors import safe_open

    folder = golden / "cases" / "d_full_fullvit" / {"hf": "huggingface"}.get(layout, layout)
    names: set[str] = set()
    for file in folder.rglob("*.safetensors"):
        inside = file.parent.relative_to(folder).as_posix()
        prefix = "" if layout != "xtuner" else "root/" if inside == "." else f"{inside}/"
        with safe_open(file, "np") as opened:
            names |= {prefix + name for name in opened.keys()}  # noqa: SIM118 - no dict
    assert names == FROZEN[layout]


def test_against_xtuner_training(golden: Path) -> None:
    """The real `.pth` of a run that trained everything holds the frozen names."""
    from llava_convert.storage.torch.file import read_torch, state_dict

    path = golden / "cases" / "d_full_fullvit" / "pth" / "iter_2.pth"
    assert set(state_dict(read_torch(path)).tensors) == FROZEN["pth"]


# --- the dialects of transformers' layout (FORMATS-hf 1.1), each as the release which writes it spells it


def _dialect(llm: str, head: str, tower: str, projector: str) -> set[str]:
    return {
        *(f"{llm}{name}" for name in LLAMA),
        f"{head}.weight",
        *(f"{tower}{name}" for name in CLIP),
        *(f"{projector}linear_{i}.{kind}" for i in (1, 2) for kind in LINEAR),
    }


NEW_LLM, NEW_PROJECTOR = "model.language_model.", "model.multi_modal_projector."
DIALECTS = {
    "A": FROZEN["hf"],
    "B": _dialect(NEW_LLM, "lm_head", "model.vision_tower.vision_model.", NEW_PROJECTOR),
    "B2": _dialect(NEW_LLM, "lm_head", "model.vision_tower.", NEW_PROJECTOR),
    "C": _dialect("language_model.model.", "language_model.lm_head", "vision_tower.", "multi_modal_projector."),
    "D": _dialect("model.language_model.model.", "lm_head", "model.vision_tower.vision_model.", NEW_PROJECTOR),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_hf_dialect_reads_to_the_same_names(dialect: str) -> None:
    table = layout_table("hf")
    read = {disk: table.read(disk) for disk in DIALECTS[dialect]}
    assert [disk for disk, named in read.items() if named is None] == []
    canonical = {named.canonical for named in read.values() if named is not None}
    expected = canonical_names("llama", "llama") + canonical_names("clip", "clip_vision_model", num_hidden_layers=3)
    assert canonical == {*expected, *canonical_names("mlp", "projector")}


@pytest.mark.parametrize("disk", ["image_newline", "model.image_newline"])
def test_image_newline_of_both_spellings(disk: str) -> None:
    named = layout_table("hf").read(disk)
    assert named is not None and named.canonical == "image_newline"


def test_against_transformers_llava() -> None:
    """The names of this release's own LlavaForConditionalGeneration are read, whichever dialect they are in."""
    import torch
    from transformers.models.clip import CLIPVisionConfig
    from transformers.models.llama import LlamaConfig
    from transformers.models.llava import LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    text = LlamaConfig(num_hidden_layers=2, vocab_size=16, **sizes)
    vision = CLIPVisionConfig(num_hidden_layers=3, image_size=28, patch_size=14, **sizes)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    read = {name: layout_table("hf").read(name) for name in model.state_dict()}
    assert [name for name, named in read.items() if named is None] == []
    expected = canonical_names("llama", "llama") + canonical_names("clip", "clip_vision_model", num_hidden_layers=3)
    found = {named.canonical for named in read.values() if named is not None}
    assert found == {*expected, *canonical_names("mlp", "projector")}


# --- official LLaVA's other spellings


@pytest.mark.parametrize(
    ("disk", "canonical", "dialect"),
    [
        ("mm_projector.0.weight", "projector.0.weight", "bare"),
        ("model.mm_projector.weight", "projector.0.weight", "linear"),
        ("base_model.model.model.mm_projector.2.bias", "projector.2.bias", "lora"),
        (
            "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight",
            "language_model.model.layers.3.mlp.up_proj.lora_A.weight",
            "lora",
        ),
        ("model.image_newline", "image_newline", "official"),
    ],
)
def test_official_dialects(disk: str, canonical: str, dialect: str) -> None:
    named = layout_table("official").read(disk)
    assert named is not None
    assert (named.canonical, named.dialect) == (canonical, dialect)


def test_text_half_of_a_clip_model_is_dropped_with_a_reason() -> None:
    reason = layout_table("parts").dropped("visual-encoder/text_model.encoder.layers.0.mlp.fc1.weight")
    assert reason is not None and "text half" in reason
    assert layout_table("parts").dropped("visual-encoder/vision_model.post_layernorm.weight") is None


# --- texts of errors


def test_grouped_joins_layers() -> None:
    names = [f"layers.{i}.mlp.foo" for i in range(32)] + ["b", "layers.3.bar", "layers.9.bar"]
    assert grouped(names) == "b, layers.{0…31}.mlp.foo, layers.{3,9}.bar"
    assert grouped(f"layers.{i}.foo" for i in (5, 3, 4)) == "layers.{3…5}.foo"


def test_grouped_is_bounded() -> None:
    kinds = grouped(f"kind{i}.{i}" for i in range(1000))
    assert kinds.endswith(", and 988 more kinds")
    assert len(grouped(f"{'x' * 5000}{i}" for i in range(1000))) < 12 * 220
    assert grouped(f"a.{7 * i}.b" for i in range(1000)) == "a.{0,7,14,21,28,35,42,49,…}.b"


def test_grouped_survives_hostile_numbers() -> None:
    start = time.process_time()
    assert grouped(["a.0.b", "a.999999999999999.b"]) == "a.{0,999999999999999}.b"
    assert grouped(["a.².b"]) == "a.².b", "a digit that is no number"
    assert time.process_time() - start < 1


def test_printable_escapes_and_cuts() -> None:
    assert printable("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert printable("x" * 300) == "x" * 40 + "…" + "x" * 80 + " (300 characters)"
    assert printable("\x00" * 300) == "\\x00" * 10 + "…" + "\\x00" * 20 + " (300 characters)"
    assert printable(f"/{'a' * 200}/config.json").endswith("/config.json (213 characters)")
    assert printable(PurePath("/", "a" * 200, "config.json")) == f"/{'a' * 200}/config.json"


def test_lookup_error_names_count_groups_and_the_nearest() -> None:
    table = layout_table("official")
    unknown = {f"model.layer.{i}.mlp.foo": "" for i in range(32)}
    text = lookup_errors(unknown, table)
    assert text.startswith(
        "32 tensors that nothing takes: model.layer.{0…31}.mlp.foo; nearest row: model.layers.{tensor"
    )
    line = re.search(r"\(official\.toml line (\d+)\)", text)
    assert line is not None
    row = table.path.read_text().splitlines()[int(line[1]) - 1]
    assert 'disk = "{body}.{tensor...}"' in row, "the row that stands for model.layers.{tensor...}, among others"
    known = lookup_errors({"modl.norm.weight": ""}, table, ["model.norm.weight"])
    assert known == "1 tensor that nothing takes: modl.norm.weight; nearest known name: model.norm.weight"


def test_lookup_error_of_a_huge_name_is_short_and_quick() -> None:
    start = time.process_time()
    assert len(lookup_errors({"a.b" * 40_000: ""}, layout_table("hf"))) < 600
    assert time.process_time() - start < 2


def test_a_tensor_without_a_name_is_never_dropped() -> None:
    tensor = StoredTensor("strange.weight", "F32", (1,), ())
    with pytest.raises(UnsupportedError, match=r"hf has no name for strange\.weight"):
        renamed({"strange.weight": Recipe(tensor)}, layout_table("hf"), lambda symbol: 1, side=CANONICAL)
