"""Every layout to every other on the tiny model: tensors, files beside them, and what real readers make of both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open

import llava_convert
from llava_convert.core.errors import MismatchError, UnsupportedError, UsageError
from llava_convert.storage.safetensors import read_header

LAYOUTS = ("xtuner", "official", "hf")
PARTS = ("llm", "projector", "visual-encoder")
ROWS, PADDED = 512, 576
LLM_TENSORS, TOWER_TENSORS, PROJECTOR_TENSORS = 21, 55, 4
JSON = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "preprocessor_config.json",
)  # fmt: skip
Convert = Callable[..., Path]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint in each layout, straight from the `.pth`; every byte is checked on the way."""
    folder = tmp_path_factory.mktemp("made")
    for layout in LAYOUTS:
        report = llava_convert.convert(tiny / "iter_2.pth", to=layout, out=folder / layout, verify="full")
        assert (report.done, report.verified) == (True, "full")
    return {layout: folder / layout for layout in LAYOUTS}


@pytest.fixture
def convert(tmp_path: Path, tiny: Path) -> Convert:
    """Convert into a fresh folder; the xtuner layout has its tower from the base."""

    def go(source: Path, to: str, out: str = "out", **options: Any) -> Path:
        if (source / "visual_encoder_adapter").is_dir():
            options.setdefault("visual_encoder", str(tiny / "vit"))
        llava_convert.convert(source, to=to, out=tmp_path / out, **options)
        return tmp_path / out

    return go


def tensors(folder: Path) -> Tensors:
    """Every tensor in a folder, by the real library's own header and bytes: dtype, shape, raw bytes."""
    found: Tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        prefix = file.parent.relative_to(folder).as_posix() + "/" if file.parent != folder else ""
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - no dict
                tensor = opened.get_tensor(name)
                raw = bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())
                found[prefix + name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw)
    return found


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def without_added(found: Tensors) -> Tensors:
    """Less the rows that the conversion to hf adds: each is the mean of rows which were rounded before, or not yet."""
    return {
        name: (dtype, shape, raw[: ROWS * len(raw) // shape[0]] if shape[0] == PADDED else raw)
        for name, (dtype, shape, raw) in found.items()
    }


def dtypes(found: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> set[str]:
    return {dtype for dtype, _, _ in found.values()}


# --- whole models


@pytest.mark.parametrize(
    ("layout", "count"),
    [("hf", 80), ("official", 80), ("xtuner", LLM_TENSORS + PROJECTOR_TENSORS + 2 * 18)],
)
def test_from_training(made: dict[str, Path], layout: str, count: int) -> None:
    found = tensors(made[layout])
    assert len(found) == count
    assert dtypes(found) == ({"float16", "float32"} if layout == "xtuner" else {"float16"})
    record = read(made[layout], "conversion.json")
    assert record["layout"] == {"from": "pth", "to": layout}
    assert sorted(record["tensors"]) == sorted(found)
    assert record["sources"][0]["role"] == "source"


def test_parts_of_the_xtuner_layout(made: dict[str, Path]) -> None:
    found = tensors(made["xtuner"])
    kinds = {name.rpartition("/")[0]: set[str]() for name in found}
    for name, (dtype, _, _) in found.items():
        kinds[name.rpartition("/")[0]].add(dtype)
    assert kinds == {"": {"float16"}, "projector": {"float32"}, "visual_encoder_adapter": {"float32"}}
    files = {p.relative_to(made["xtuner"]).as_posix() for p in made["xtuner"].rglob("*") if p.is_file()}
    assert {f for f in files if "/" in f} == {
        "projector/config.json",
        "projector/configuration_projector.py",
        "projector/modeling_projector.py",
        "projector/model.safetensors",
        "visual_encoder_adapter/adapter_config.json",
        "visual_encoder_adapter/adapter_model.safetensors",
    }


def test_official_to_hf_and_back(made: dict[str, Path], convert: Convert) -> None:
    """The added rows and tokens are taken off again: the same bytes, the same files."""
    there = convert(made["official"], "hf", "there", verify="full")
    assert without_added(tensors(there)) == without_added(tensors(made["hf"]))
    back = convert(there, "official", "back", verify="full")
    assert tensors(back) == tensors(made["official"])
    for name in JSON:
        assert read(back, name) == read(made["official"], name), name
    before, after = ({p.name for p in folder.iterdir()} for folder in (made["official"], back))
    assert after == before


def test_hf_to_xtuner_and_back(made: dict[str, Path], convert: Convert) -> None:
    there = convert(made["hf"], "xtuner", "there", verify="full")
    assert (there / "visual_encoder" / "config.json").is_file(), "from hf the tower is whole"
    rows = tensors(there)["model.embed_tokens.weight"]
    assert rows == tensors(made["official"])["model.embed_tokens.weight"], "the added rows are taken off"
    back = convert(there, "hf", "back", verify="full")
    assert without_added(tensors(back)) == without_added(tensors(made["hf"]))
    for name in (*JSON, "processor_config.json"):
        one, other = read(back, name), read(made["hf"], name)
        if name == "tokenizer_config.json":  # the next test's
            one.pop("chat_template"), other.pop("chat_template")
        assert one == other, name


@pytest.mark.parametrize("to", ["official", "xtuner"])
def test_the_trained_template_survives_a_detour(made: dict[str, Path], convert: Convert, to: str) -> None:
    """From hf to another layout the chat template is what it is straight from the `.pth`."""
    out = convert(made["hf"], to)
    assert read(out, "tokenizer_config.json") == read(made[to], "tokenizer_config.json")


@pytest.mark.parametrize("to", ["official", "hf"])
def test_xtuner_with_its_base_is_the_whole_model(made: dict[str, Path], convert: Convert, to: str) -> None:
    """The adapter merged later gives what it gives when it is merged at once."""
    out = convert(made["xtuner"], to, verify="full")
    assert without_added(tensors(out)) == without_added(tensors(made[to]))


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_verify_agrees(made: dict[str, Path], convert: Convert, tiny: Path, source: str, to: str) -> None:
    base = {"visual_encoder": str(tiny / "vit")}
    if source == to:
        with pytest.raises(UnsupportedError, match=f"is already {to} layout"):
            convert(made[source], to)
        return
    out = convert(made[source], to)
    verdict = llava_convert.verify(made[source], out, **(base if source == "xtuner" else {}))
    assert verdict.same, (verdict.different, verdict.missing, verdict.extra, verdict.settings)
    assert verdict.equal > 60
    assert verdict.added_rows == ({} if to != "hf" else dict.fromkeys(verdict.added_rows, 64))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_input_gives_the_same_bytes(tiny: Path, made: dict[str, Path], convert: Convert, layout: str) -> None:
    out = convert(tiny / "iter_2.pth", layout, "again", name=layout, threads=3, verify="full")
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert files == {p.relative_to(made[layout]): p.read_bytes() for p in made[layout].rglob("*") if p.is_file()}


# --- options


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("to", LAYOUTS)
def test_dtype(tiny: Path, convert: Convert, to: str, dtype: str) -> None:
    out = convert(tiny / "iter_2.pth", to, dtype=dtype, verify="full")
    found = tensors(out)
    llm = {name: one for name, one in found.items() if "/" not in name}
    assert dtypes(llm) == {dtype}
    assert dtypes({k: v for k, v in found.items() if k not in llm}) <= {"float32"}
    config = read(out, "config.json")
    assert config["torch_dtype"] == dtype
    if to == "hf":
        assert {config[part]["torch_dtype"] for part in ("text_config", "vision_config")} == {dtype}


def test_dtype_within_a_layout(made: dict[str, Path], convert: Convert) -> None:
    out = convert(made["hf"], "hf", dtype="bfloat16", verify="full")
    ours, theirs = tensors(out), tensors(made["hf"])
    assert ours.keys() == theirs.keys()
    assert {shape for _, shape, _ in ours.values()} == {shape for _, shape, _ in theirs.values()}
    for name, (_, shape, raw) in ours.items():
        wanted = torch.frombuffer(bytearray(theirs[name][2]), dtype=torch.float16).bfloat16()
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.bfloat16), wanted), (name, shape)


def test_a_cast_that_overflows_is_refused(tmp_path: Path, made: dict[str, Path], convert: Convert) -> None:
    source = convert(made["hf"], "hf", "wide", dtype="float32")
    at = read_header(source / "model.safetensors").tensors["language_model.model.norm.weight"].extents[0].offset
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(at)
        file.write(torch.tensor([1e6]).numpy().tobytes())
    with pytest.raises(MismatchError, match=r"model\.norm\.weight: 1 finite values do not fit") as caught:
        convert(source, "official", dtype="float16")
    assert caught.value.hint is not None and "dtype='bfloat16'" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["wide"]


EXPECTED_PARTS = {
    ("official", "llm"): (LLM_TENSORS, {"model.safetensors", "config.json", "tokenizer.json"}),
    ("official", "projector"): (0, {"mm_projector.bin", "config.json"}),
    ("official", "visual-encoder"): (TOWER_TENSORS, {"model.safetensors", "preprocessor_config.json"}),
    ("hf", "llm"): (LLM_TENSORS, {"model.safetensors", "config.json", "tokenizer.json"}),
    ("hf", "projector"): (PROJECTOR_TENSORS, {"model.safetensors"}),
    ("hf", "visual-encoder"): (TOWER_TENSORS, {"model.safetensors", "preprocessor_config.json"}),
    ("xtuner", "llm"): (LLM_TENSORS, {"model.safetensors", "config.json", "tokenizer.json"}),
    ("xtuner", "projector"): (PROJECTOR_TENSORS, {"projector/model.safetensors"}),
    ("xtuner", "visual-encoder"): (36, {"visual_encoder_adapter/adapter_model.safetensors"}),
}


@pytest.mark.parametrize(("to", "part"), EXPECTED_PARTS)
def test_one_part(tiny: Path, made: dict[str, Path], convert: Convert, to: str, part: str) -> None:
    count, files = EXPECTED_PARTS[to, part]
    out = convert(tiny / "iter_2.pth", to, part=part, verify="full")
    found = tensors(out)
    assert len(found) == count
    assert files <= {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    # The same tensors that the whole output has, under the names of the part's own class.
    whole = {one[1:] for one in tensors(made["official" if to != "xtuner" else "xtuner"]).values()}
    assert {one[1:] for one in found.values()} <= whole
    verdict = llava_convert.verify(tiny / "iter_2.pth", out) if to == "official" and part == "projector" else None
    assert verdict is None or verdict.same


@pytest.mark.parametrize(("part", "name"), [("llm", "LlamaForCausalLM"), ("visual-encoder", "CLIPVisionModel")])
@pytest.mark.parametrize("to", ["official", "hf"])
def test_one_part_loads_in_its_own_class(
    made: dict[str, Path], convert: Convert, to: str, part: str, name: str
) -> None:
    from transformers.models.clip import CLIPVisionModel
    from transformers.models.llama import LlamaForCausalLM

    source = made["hf" if to == "official" else "official"]
    out = convert(source, to, part=part)
    assert read(out, "config.json")["architectures"] == [name]
    cls: Any = {"LlamaForCausalLM": LlamaForCausalLM, "CLIPVisionModel": CLIPVisionModel}[name]
    model, info = cls.from_pretrained(out, output_loading_info=True, local_files_only=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    held = tensors(out)
    for key, tensor in model.state_dict().items():
        raw = held.get(key) or held[f"vision_model.{key.removeprefix('vision_model.')}"]
        assert bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()) == raw[2], key


@pytest.mark.parametrize("source", ["pth", "hf", "official"])
def test_projector_file(tiny: Path, made: dict[str, Path], convert: Convert, source: str) -> None:
    """Its reader calls torch.load, and looks for the full names."""
    path = tiny / "iter_2.pth" if source == "pth" else made[source]
    out = convert(path, "official", part="projector", visual_encoder_id="org/tower", llm_id="org/llm")
    options = {"to": "official", "part": "projector", "visual_encoder_id": "org/tower", "llm_id": "org/llm"}
    (shard,) = llava_convert.convert(path, **options, out=out.with_name("planned"), dry_run=True).plan.shards
    assert shard.size == (out / "mm_projector.bin").stat().st_size, "the plan counts it, and so the check of the room"
    state = torch.load(out / "mm_projector.bin", weights_only=True)
    assert sorted(state) == [f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
    held = tensors(made["official"])
    for name, tensor in state.items():
        assert bytes(tensor.flatten().view(torch.uint8).numpy()) == held[name][2]
    config = read(out, "config.json")
    assert (config["mm_vision_tower"], config["mm_projector_type"]) == ("org/tower", "mlp2x_gelu")
    assert (config["unfreeze_mm_vision_tower"], config["mm_hidden_size"]) == (False, 32)


def test_projector_file_names_the_tower_of_its_source(made: dict[str, Path], convert: Convert) -> None:
    """Not the folder that the projector happened to come from."""
    out = convert(made["hf"], "official", part="projector")
    assert read(out, "config.json")["mm_vision_tower"] == "vit"


@pytest.mark.parametrize("to", LAYOUTS)
def test_shards_of_a_size(tiny: Path, made: dict[str, Path], convert: Convert, to: str) -> None:
    out = convert(tiny / "iter_2.pth", to, max_shard_size="50KB", verify="full")
    assert tensors(out) == tensors(made[to])
    index = read(out, "model.safetensors.index.json")
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 4
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total = 0
    for shard in shards:
        held = read_header(out / shard).tensors
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= 50_000 or len(held) == 1
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(held)
        total += size
    assert index["metadata"] == {"total_size": total}


def test_shards_against_the_hub_library(tiny: Path, convert: Convert) -> None:
    """huggingface_hub follows the index, strictly, and finds every tensor of the model."""
    from huggingface_hub import load_torch_model
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    out = convert(tiny / "iter_2.pth", "xtuner", max_shard_size="50KB", part="llm")
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(out)).half()
    result = load_torch_model(model, out, strict=True, filename_pattern="model{suffix}.safetensors")
    assert not result.missing_keys and not result.unexpected_keys
    held = tensors(out)
    for name, tensor in model.state_dict().items():
        assert bytes(tensor.flatten().view(torch.uint8).numpy()) == held[name][2], name


def test_keep_follows_the_shards_of_the_source(tiny: Path, convert: Convert) -> None:
    cut = convert(tiny / "iter_2.pth", "official", "cut", max_shard_size="50KB")
    out = convert(cut, "hf", "kept")
    one, other = (read(folder, "model.safetensors.index.json")["weight_map"] for folder in (cut, out))
    assert len(set(one.values())) == len(set(other.values())) > 4
    joined = convert(cut, "hf", "joined", max_shard_size="5GB")
    assert not (joined / "model.safetensors.index.json").exists()
    assert tensors(joined) == tensors(out)


@pytest.mark.parametrize("to", LAYOUTS)
def test_digests_are_of_the_bytes(tiny: Path, made: dict[str, Path], convert: Convert, to: str) -> None:
    out = convert(tiny / "iter_2.pth", to, digest=True)
    held = tensors(out)
    assert held == tensors(made[to]), "another way through the executor, the same bytes"
    recorded = read(out, "conversion.json")["tensors"]
    assert {name: entry["xxh3_128"] for name, entry in recorded.items()} == {
        name: xxhash.xxh3_128_hexdigest(raw) for name, (_, _, raw) in held.items()
    }
    assert all("xxh3_128" not in entry for entry in read(made[to], "conversion.json")["tensors"].values())


def test_digests_of_copies(made: dict[str, Path], convert: Convert) -> None:
    out = convert(made["official"], "hf", digest=True)
    recorded = read(out, "conversion.json")["tensors"]
    for name, (_, _, raw) in tensors(out).items():
        assert recorded[name]["xxh3_128"] == xxhash.xxh3_128_hexdigest(raw)


def test_digests_of_a_projector_file(made: dict[str, Path], convert: Convert) -> None:
    out = convert(made["hf"], "official", part="projector", digest=True)
    state = torch.load(out / "mm_projector.bin", weights_only=True)
    recorded = read(out, "conversion.json")["tensors"]
    assert {name: entry["xxh3_128"] for name, entry in recorded.items()} == {
        name: xxhash.xxh3_128_hexdigest(tensor.flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in state.items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_size": "0"}, "is not a size"),
        ({"part": "tower"}, "part='tower'"),
        ({"prompt_template": "no_such"}, "no_such"),
        ({"image_processor": "square"}, "square"),
    ],
)
def test_usage(made: dict[str, Path], convert: Convert, tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        convert(made["official"], "hf", **options)
    assert list(tmp_path.iterdir()) == []


# --- what is on disk


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_local_path_in_any_file(made: dict[str, Path], tiny: Path, layout: str, convert: Convert) -> None:
    others = [convert(made[layout], to, to) for to in LAYOUTS if to != layout]
    for folder in (made[layout], *others):
        forbidden = [str(p).encode() for p in (folder.parent, tiny.parent, Path.home(), Path.cwd()) if p != Path("/")]
        for file in folder.rglob("*"):
            if file.is_file():
                data = file.read_bytes()
                assert [path for path in forbidden if path in data] == [], file
                if file.suffix in (".json", ".md", ".jinja", ".py"):
                    assert b"fixtures" not in data, file


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
@pytest.mark.parametrize("to", LAYOUTS)
def test_modes_follow_the_umask(
    tiny: Path, convert: Convert, to: str, umask: int, file_mode: int, folder_mode: int
) -> None:
    before = os.umask(umask)
    try:
        out = convert(tiny / "iter_2.pth", to)
        projector = convert(tiny / "iter_2.pth", "official", "projector", part="projector")
    finally:
        os.umask(before)
    for path in (out, projector, *out.rglob("*"), *projector.rglob("*")):
        mode = path.stat().st_mode & 0o777
        assert mode == (folder_mode if path.is_dir() else file_mode), path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_json_is_plain(made: dict[str, Path], layout: str) -> None:
    """No NaN, no duplicate key: what any reader can read."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def constant(name: str) -> None:
        raise AssertionError(name)

    files = list(made[layout].rglob("*.json"))
    assert len(files) >= 6
    for file in files:
        json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once, parse_constant=constant)
