"""Names and shapes that do not fit: rows 31 and 47 to 57 of the fault list, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_convert.model.tables.families import architecture_for, architectures
from llava_convert.model.tables.names import layout_table, parse_layout_table
from llava_convert.model.tables.patterns import TableError
from tests.faults.corpus import (
    EMBED,
    HEAD,
    Q_PROJ,
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
VIT_HF = "vision_tower.vision_model"


def hf_embed(tensors: State) -> torch.Tensor:
    return tensors[f"language_model.{EMBED}"]


# -- 31: config and tensors disagree


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"num_hidden_layers": 3}, ("model.layers.2.",)),
        ({"num_hidden_layers": 1}, ("model.layers.1.",)),
        ({"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}, ("config [512, 32]", "[512, 64]")),
        ({"vocab_size": 600}, ("embed_tokens", "config [600, 64]", "checkpoint [512, 64]")),
        ({"intermediate_size": 64}, ("mlp", "config [64, 64]", "checkpoint [128, 64]")),
    ],
    ids=["more layers", "fewer layers", "hidden size", "vocabulary", "intermediate size"],
)
def test_fault_31_config_and_tensors_disagree(
    corpus: Corpus, tmp_path: Path, changes: dict[str, int], fragments: tuple[str, ...]
) -> None:
    source = corpus.copy("official", tmp_path)
    edit_json(source / "config.json", **changes)
    code = 4 if changes.get("num_hidden_layers") == 1 else 3  # a layer too many is a name that nothing takes
    refused(
        tmp_path,
        code,
        "language model",
        *fragments,
        args=("official", source, "--to", "hf", "-o", tmp_path / "out", *VIT),
    )


def test_fault_31_the_table_is_bounded(corpus: Corpus, tmp_path: Path) -> None:
    source = corpus.copy("official", tmp_path)
    edit_json(source / "config.json", hidden_size=32, num_attention_heads=2)
    ran = refused(tmp_path, 3, args=("official", source, "--to", "hf", "-o", tmp_path / "out", *VIT))
    assert len(ran.stderr.splitlines()) <= 12 and "more" in ran.stderr


# -- 47 to 51: names


@pytest.mark.parametrize("layout", ["pth", "official", "hf", "xtuner"])
def test_fault_47_one_unknown_tensor(corpus: Corpus, tmp_path: Path, layout: str) -> None:
    name = {
        "pth": "llm.model.layers.1.mlp.gate_prog.weight",
        "hf": "language_model.model.layers.1.mlp.gate_prog.weight",
    }
    unknown = name.get(layout, "model.layers.1.mlp.gate_prog.weight")
    if layout == "pth":
        state, cfg = trained()
        source = write_pth(tiny(tmp_path), {**state, unknown: torch.ones(2)}, cfg)
    else:
        source = corpus.copy(layout, tmp_path)
        edit_tensors(source / "model.safetensors", lambda s: {**s, unknown: torch.ones(2)})
    target = "official" if layout == "hf" else "hf"
    refused(
        tmp_path,
        4,
        "gate_prog",
        "nearest known name: language_model.model.layers.1.mlp.gate_proj.weight",
        args=(layout, source, "--to", target, "-o", tmp_path / "out", *VIT),
    )


def test_fault_47_a_prefix_that_no_row_has(corpus: Corpus, tmp_path: Path) -> None:
    source = corpus.copy("hf", tmp_path)
    edit_tensors(source / "model.safetensors", lambda s: {**s, "audio_tower.proj.weight": torch.ones(2)})
    args = ("hf", source, "--to", "official", "-o", tmp_path / "out")
    refused(tmp_path, 4, "1 tensor that nothing takes: audio_tower.proj.weight", "hf.toml line", args=args)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["language_model.model.layers.{}.mlp.foo", "a.{}.b{}"])
def test_fault_47_ten_thousand_unknown_tensors_stay_readable(corpus: Corpus, tmp_path: Path, pattern: str) -> None:
    source = corpus.copy("hf", tmp_path)
    many = {pattern.format(n, n): torch.ones(1) for n in range(10_000)}
    edit_tensors(source / "model.safetensors", lambda s: {**s, **many})
    ran = refused(tmp_path, 4, args=("hf", source, "--to", "official", "-o", tmp_path / "out"))
    assert "10000 tensors" in ran.stderr and len(ran.stderr) < 2500
    if "layers" in pattern:
        assert "layers.{0…9999}.mlp.foo" in ran.stderr


@pytest.mark.parametrize("layout", ["official", "hf", "xtuner"])
def test_fault_48_one_missing_tensor(corpus: Corpus, tmp_path: Path, layout: str) -> None:
    source = corpus.copy(layout, tmp_path)
    gone = f"language_model.{Q_PROJ}" if layout == "hf" else Q_PROJ
    edit_tensors(source / "model.safetensors", lambda s: {k: v for k, v in s.items() if k != gone})
    target = "official" if layout == "hf" else "hf"
    args = (layout, source, "--to", target, "-o", tmp_path / "out", *VIT)
    refused(tmp_path, 3, "lacks 1 tensor", f"language_model.{Q_PROJ}", args=args, mend="--llm")


def test_fault_48_a_missing_middle_layer(corpus: Corpus, tmp_path: Path) -> None:
    source = corpus.copy("hf", tmp_path)
    edit_tensors(source / "model.safetensors", lambda s: {k: v for k, v in s.items() if ".encoder.layers.1." not in k})
    args = ("hf", source, "--to", "official", "-o", tmp_path / "out")
    ran = refused(tmp_path, 3, "vision tower", "encoder.layers.1.", args=args, mend="--visual-encoder")
    assert ".layers.0." not in ran.stderr and ".layers.2." not in ran.stderr


def test_fault_48_a_missing_projector(corpus: Corpus, tmp_path: Path) -> None:
    source = corpus.copy("hf", tmp_path)
    edit_tensors(source / "model.safetensors", lambda s: {k: v for k, v in s.items() if "projector" not in k})
    refused(tmp_path, 3, "no projector", args=("hf", source, "--to", "official", "-o", tmp_path / "out"))


def test_fault_49_old_buffers_are_dropped_with_a_reason(corpus: Corpus, tmp_path: Path) -> None:
    source = corpus.copy("hf", tmp_path)
    buffers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "language_model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8),
        f"{VIT_HF}.embeddings.position_ids": torch.arange(17).unsqueeze(0),
    }
    edit_tensors(source / "model.safetensors", lambda s: {**s, **buffers})
    ran = accepted("hf", source, "--to", "official", "-o", tmp_path / "out", "--json")
    assert any("left out 3 (a buffer that the model computes" in note for note in ran.report["notes"])
    dropped = json.loads((tmp_path / "out" / "conversion.json").read_text())["dropped"]
    assert {d["name"] for d in dropped} == set(buffers) and all(d["reason"] for d in dropped)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in written if "inv_freq" in name or "position_ids" in name]


ROW = '{ disk = "a.{x}", canonical = "b.{x}" }'
BAD_TABLES = {
    "two rows take one name": (f'[{ROW}, {{ disk = "a.c", canonical = "d" }}]', "same name"),
    "a rest over a name": (f'[{ROW}, {{ disk = "{{y...}}", canonical = "d.{{y...}}" }}]', "same name"),
    "two rows make one name": (f'[{ROW}, {{ disk = "c.{{x}}", canonical = "b.{{x}}" }}]', "same name"),
    "a lost placeholder": ('[{ disk = "a.{x}", canonical = "b" }]', "different placeholders"),
    "a made-up placeholder": ('[{ disk = "a", canonical = "b.{x}" }]', "different placeholders"),
    "one segment against many": ('[{ disk = "a.{x...}", canonical = "b.{x}" }]', "different placeholders"),
    "two rests": ('[{ disk = "{x...}.a.{y...}", canonical = "{x...}.b.{y...}" }]', "bad pattern"),
    "a placeholder twice": ('[{ disk = "a.{x}.{x}", canonical = "b.{x}.{x}" }]', "bad pattern"),
    "an empty segment": ('[{ disk = "a..b", canonical = "c" }]', "bad pattern"),
    "an open brace": ('[{ disk = "a.{x", canonical = "b.{x" }]', "bad pattern"),
    "a brace in a segment": ('[{ disk = "a.q{x}_proj", canonical = "b.q{x}_proj" }]', "bad pattern"),
    "no row that is written": (f'[{ROW[:-1]}, dialect = "old" }}]', "no row"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_fault_50_bad_tables_are_refused_when_loaded(case: str) -> None:
    rows, fragment = BAD_TABLES[case]
    with pytest.raises(TableError, match=fragment):
        parse_layout_table(f'layout = "x"\nwrites = "now"\nrow = {rows}', Path("x.toml"))


def test_fault_50_a_drop_may_not_take_what_a_row_takes() -> None:
    text = f'layout = "x"\nwrites = "now"\nrow = [{ROW}]\ndrop = [{{ disk = "a.{{y}}", reason = "r" }}]'
    with pytest.raises(TableError, match="same name"):
        parse_layout_table(text, Path("x.toml"))


def test_fault_50_two_dialects_may_mean_one_tensor() -> None:
    text = (
        f'layout = "x"\nwrites = "now"\nrow = [{ROW}, {{ disk = "o.{{x}}", canonical = "b.{{x}}", dialect = "old" }}]'
    )
    table = parse_layout_table(text, Path("x.toml"))
    assert table.write("b.w") == ("a.w", 0)
    assert [named.canonical for named in (table.read("a.w"), table.read("o.w")) if named] == ["b.w", "b.w"]


@pytest.mark.parametrize("layout", ["hf", "official"])
@pytest.mark.parametrize("name", sorted(architectures()))
def test_fault_50_every_tensor_of_every_family_has_one_name_in_each_layout(layout: str, name: str) -> None:
    """No two sources of a target: names are unique, and each leads back to its tensor."""
    family, table = architectures()[name], layout_table(layout)
    sizes = {"text_hidden_size": 4, "vision_hidden_size": 4, "steps": 1, "bias": True}
    config = family.complete({"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, **sizes})
    canonical = list(family.tensors(config))
    if layout == "hf" and family.part == "projector":
        canonical = [c for c in canonical if c.split(".")[1] in "02"]
    disk = [written[0] for c in canonical if (written := table.write(c)) is not None]
    assert len(set(disk)) == len(canonical) > 3
    assert [named.canonical for d in disk if (named := table.read(d)) is not None] == canonical


@pytest.mark.parametrize("layout", ["hf", "official", "xtuner"])
def test_fault_51_already_converted(corpus: Corpus, tmp_path: Path, layout: str) -> None:
    source = corpus.copy(layout, tmp_path)
    args = (layout, source, "--to", layout, "-o", tmp_path / "out", *VIT)
    refused(tmp_path, 4, f"already {layout} layout", args=args, mend="--dtype")


@pytest.mark.parametrize(("said", "real"), [("hf", "official"), ("official", "hf"), ("pth", "hf"), ("hf", "pth")])
def test_fault_51_another_layout_than_said(corpus: Corpus, tmp_path: Path, said: str, real: str) -> None:
    source = corpus.copy(real, tmp_path)
    args = (said, source, "--to", "xtuner", "-o", tmp_path / "out", *VIT)
    refused(tmp_path, 4, f"not of the {said} layout but {real}", args=args, mend=f"llava-convert {real} ")


def test_fault_51_two_layouts_in_one_folder(corpus: Corpus, tmp_path: Path) -> None:
    source = corpus.copy("hf", tmp_path)
    (corpus.copy("xtuner", tmp_path) / "projector").rename(source / "projector")
    args = ("convert", source, "--to", "official", "-o", tmp_path / "out")
    refused(tmp_path, 4, "more than one layout", "xtuner (", "hf (", args=args, mend="say which")


# -- 52: tied heads


def tied(corpus: Corpus, folder: Path, layout: str, head: str) -> Path:
    """A copy whose config ties the head, which is absent, equal to the embedding, or different."""
    source = corpus.copy(layout, folder)
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = True
    if layout == "hf":
        config["text_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    prefix = "language_model." if layout == "hf" else ""

    def change(state: State) -> None:
        del state[prefix + HEAD]
        if head != "absent":
            state[prefix + HEAD] = state[prefix + EMBED].clone()
        if head == "different":
            state[prefix + HEAD][3, 5] += 1

    edit_tensors(source / "model.safetensors", change)
    return source


@pytest.mark.parametrize("head", ["absent", "equal", "different"])
@pytest.mark.parametrize(
    ("layout", "target"),
    [
        ("hf", "official"),
        ("hf", "xtuner"),
        ("official", "hf"),
        ("official", "xtuner"),
        ("xtuner", "hf"),
        ("xtuner", "official"),
    ],
)
def test_fault_52_tied_heads(corpus: Corpus, tmp_path: Path, layout: str, target: str, head: str) -> None:
    source, out = tied(corpus, tmp_path, layout, head), tmp_path / "out"
    ran = accepted(layout, source, "--to", target, "-o", out, "--json", "--verify", "full", *VIT)
    prefix = "language_model." if target == "hf" else ""
    written = load(out)
    config = json.loads((out / "config.json").read_text())
    stated = [config["tie_word_embeddings"]]
    if target == "hf":
        stated.append(config["text_config"]["tie_word_embeddings"])
    assert stated == [head != "different"] * len(stated)
    warned = [w for w in ran.report["warnings"] if "lm_head differs from embed_tokens" in w]
    assert bool(warned) == (head == "different")
    if head == "different":
        apart = (written[prefix + HEAD][:512] != written[prefix + EMBED][:512]).nonzero().tolist()
        assert apart == [[3, 5]]
    elif prefix + HEAD in written:
        assert torch.equal(written[prefix + HEAD], written[prefix + EMBED])
    assert run("verify", source, out, *VIT).code == 0


# -- 53: the vocabulary


@pytest.mark.parametrize(("rows", "out_rows"), [(512, 576), (514, 576), (515, 515), (640, 640)])
def test_fault_53_rows_enough(corpus: Corpus, tmp_path: Path, rows: int, out_rows: int) -> None:
    source, out = resized(corpus, tmp_path, rows), tmp_path / "out"
    accepted("official", source, "--to", "hf", "-o", out, *VIT)
    config = json.loads((out / "config.json").read_text())
    written = load_file(out / "model.safetensors")
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == out_rows
    for name in (EMBED, HEAD):
        assert written[f"language_model.{name}"].shape[0] == out_rows
        old = load_file(source / "model.safetensors")[name]
        assert torch.equal(written[f"language_model.{name}"][:rows], old)
    assert (config["image_token_index"], config["pad_token_id"]) == (513, 514)


def resized(corpus: Corpus, folder: Path, rows: int) -> Path:
    """The official layout with `rows` rows for its tokenizer of 512 tokens."""
    source = corpus.copy("official", folder)
    edit_json(source / "config.json", vocab_size=rows)

    def change(state: State) -> None:
        for name in (EMBED, HEAD):
            state[name] = torch.cat([state[name]] * 2)[:rows]

    edit_tensors(source / "model.safetensors", change)
    return source


@pytest.mark.parametrize(("target", "part"), [("hf", "all"), ("xtuner", "all"), ("hf", "llm"), ("official", "all")])
def test_fault_53_fewer_rows_than_tokens(corpus: Corpus, tmp_path: Path, target: str, part: str) -> None:
    source = resized(corpus, tmp_path, 500)
    args = ("official", source, "--to", target, "-o", tmp_path / "out", "--part", part, "--dtype", "float32", *VIT)
    refused(tmp_path, 3, "512 tokens", "500 rows", args=args, mend="--llm")


def test_fault_53_an_image_token_without_a_row(corpus: Corpus, tmp_path: Path) -> None:
    """The id in the source's config is not believed: the tokenizer's counts."""
    source = corpus.copy("hf", tmp_path)
    edit_json(source / "config.json", image_token_index=100_000)
    accepted("hf", source, "--to", "hf", "--dtype", "float32", "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"] == 513


# -- 54 to 57: shapes


@pytest.mark.parametrize(("layers", "kind"), [(1, "mlp1x_gelu"), (3, "mlp3x_gelu")])
def test_fault_54_projectors_of_other_depths(corpus: Corpus, tmp_path: Path, layers: int, kind: str) -> None:
    state, cfg = trained()
    if layers == 1:
        state = {k: v for k, v in state.items() if not k.startswith("projector.model.2")}
    else:
        more = {f"projector.model.4.{p}": state[f"projector.model.2.{p}"].clone() for p in ("weight", "bias")}
        state = {**state, **more}
    source = write_pth(tiny(tmp_path), state, cfg)
    args = ("pth", source, "--to", "hf", "-o", tmp_path / "out")
    refused(
        tmp_path, 4, f"is {layers} (how many linear layers the projector has)", "exactly 2", args=args, mend="official"
    )
    accepted("pth", source, "--to", "official", "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_projector_type"] == kind
    assert run("verify", source, tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("side", "shape", "fragments"),
    [
        ("0", (64, 48), ("reads 48 features", "vision tower has 32")),
        ("0", (96, 32), ("[96]", "[64]")),
        ("2", (64, 48), ("[64, 64]", "[64, 48]")),
    ],
    ids=["input", "between", "inside"],
)
def test_fault_54_projectors_that_do_not_fit(
    tmp_path: Path, side: str, shape: tuple[int, int], fragments: tuple[str, ...]
) -> None:
    state, cfg = trained()
    state[f"projector.model.{side}.weight"] = torch.ones(shape)
    source = write_pth(tiny(tmp_path), state, cfg)
    args = ("pth", source, "--to", "hf", "-o", tmp_path / "out")
    refused(tmp_path, 3, "projector", *fragments, args=args)


def test_fault_54_a_projector_of_another_language_model(tmp_path: Path) -> None:
    state, cfg = trained()
    for name in [n for n in state if n.startswith("projector.")]:
        state[name] = torch.ones(tuple(96 if size == 64 else size for size in state[name].shape))
    source = write_pth(tiny(tmp_path), state, cfg)
    args = ("pth", source, "--to", "hf", "-o", tmp_path / "out")
    refused(tmp_path, 3, "writes 96 features", "language model has 64", args=args, mend="--llm")


def siglip_tower() -> State:
    config = architecture_for("vision_tower", "siglip_vision_model").complete(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56,
         "patch_size": 14, "num_channels": 3}
    )  # fmt: skip
    expected = architecture_for("vision_tower", "siglip_vision_model").tensors(config)
    return {name.removeprefix("vision_tower."): torch.ones(want.shape) for name, want in expected.items()}


def test_fault_55_siglip_weights_with_a_clip_config_as_base(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    edit_tensors(source.parent / "vit" / "model.safetensors", lambda state: siglip_tower())
    args = ("pth", source, "--to", "hf", "-o", tmp_path / "out")
    refused(tmp_path, 3, "base vit", "vision tower", "class_embedding", args=args, mend="--visual-encoder")


def test_fault_55_siglip_weights_with_a_clip_config_in_the_source(corpus: Corpus, tmp_path: Path) -> None:
    source = corpus.copy("hf", tmp_path)
    tower = {f"vision_tower.{name}": tensor.half() for name, tensor in siglip_tower().items()}
    edit_tensors(
        source / "model.safetensors",
        lambda state: {k: v for k, v in state.items() if not k.startswith("vision_tower.")} | tower,
    )
    args = ("hf", source, "--to", "official", "-o", tmp_path / "out")
    refused(tmp_path, 3, "vision tower", "class_embedding", args=args, mend="--visual-encoder")


@pytest.mark.parametrize("heads", [{"num_key_value_heads": 3}, {"num_key_value_heads": 0}, {"num_attention_heads": 5}])
def test_fault_56_head_counts_that_do_not_divide(corpus: Corpus, tmp_path: Path, heads: dict[str, int]) -> None:
    source = corpus.copy("official", tmp_path)
    edit_json(source / "config.json", **heads)
    args = ("official", source, "--to", "hf", "-o", tmp_path / "out", *VIT)
    refused(tmp_path, 3, "divide", args=args)


def test_fault_56_head_counts_that_fit_every_shape(corpus: Corpus, tmp_path: Path) -> None:
    """4 heads of 16 for 2 groups of 16; as 2 heads of 32 for 1 group it fits too, as heads for 3 groups of 16 not."""
    source = corpus.copy("official", tmp_path)
    edit_json(source / "config.json", num_attention_heads=4, num_key_value_heads=3, head_dim=16)

    def change(state: State) -> None:
        for name in [n for n in state if "k_proj.weight" in n or "v_proj.weight" in n]:
            if name.startswith("model.layers."):
                state[name] = torch.cat([state[name]] * 2)[:48]

    edit_tensors(source / "model.safetensors", change)
    args = ("official", source, "--to", "hf", "-o", tmp_path / "out", *VIT)
    refused(tmp_path, 3, "num_attention_heads 4 does not divide by num_key_value_heads 3", args=args)


def test_fault_56_vision_heads_that_do_not_divide(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    edit_json(source.parent / "vit" / "config.json", num_attention_heads=5)
    args = ("pth", source, "--to", "hf", "-o", tmp_path / "out")
    refused(tmp_path, 3, "vision tower", "hidden_size 32 does not divide by num_attention_heads 5", args=args)


@pytest.mark.parametrize("layout", ["hf", "official"])
def test_fault_57_verify_finds_a_transposed_square_tensor(corpus: Corpus, tmp_path: Path, layout: str) -> None:
    other = "official" if layout == "hf" else "hf"
    source, out = corpus.copy(other, tmp_path), corpus.copy(layout, tmp_path)
    assert run("verify", source, out, *VIT).code == 0
    name = f"language_model.{Q_PROJ}" if layout == "hf" else Q_PROJ

    def change(state: State) -> None:
        assert state[name].shape[0] == state[name].shape[1]
        state[name] = state[name].T.contiguous()

    edit_tensors(out / "model.safetensors", change)
    args = ("verify", source, out, *VIT)
    refused(tmp_path, 7, "1 tensors differ", f"language_model.{Q_PROJ}", args=args)
    ran = run(*args, "--json")
    assert ran.code == 7 and not ran.report["same"] and list(ran.report["different"]) == [f"language_model.{Q_PROJ}"]


def test_fault_57_an_orientation_is_never_guessed(corpus: Corpus, tmp_path: Path) -> None:
    """What lies transposed in a source comes out as it lies there, and verify agrees."""
    source, out = corpus.copy("official", tmp_path), tmp_path / "out"
    edit_tensors(source / "model.safetensors", lambda s: {**s, Q_PROJ: s[Q_PROJ].T.contiguous()})
    accepted("official", source, "--to", "hf", "-o", out, *VIT)
    written, stored = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert torch.equal(written[f"language_model.{Q_PROJ}"], stored[Q_PROJ])
    assert run("verify", source, out, *VIT).code == 0
