"""Stores of other programs, and what other programs save: Ollama, two folders, MLX, towers of newer transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

import llava_convert
from llava_convert.core.errors import InputError, UnsupportedError, UsageError
from llava_convert.layouts.base import OpenOptions
from llava_convert.layouts.registry import recognise


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    llava_convert.convert(tiny / "iter_2.pth", to="gguf", outtype=["f16", "q8_0"], name="m", out=folder / "gguf")
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=folder / "hf")
    return folder


# --- Ollama, LM Studio, two folders


def store(made: Path, folder: Path, *, projector: bool = True) -> tuple[Path, Path]:
    """A store of Ollama with two models; the manifest and the language model's blob of the one that is whole."""
    blobs, library = folder / "models" / "blobs", folder / "models" / "manifests" / "registry.ollama.ai" / "library"
    blobs.mkdir(parents=True)

    def blob(file: Path, kind: str) -> dict[str, str | int]:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / f"sha256-{digest}")
        kind = f"application/vnd.ollama.image.{kind}"
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": file.stat().st_size}

    text = [blob(made / "gguf" / "m-f16.gguf", "model")]
    whole = [blob(made / "gguf" / "m-q8_0.gguf", "model")]
    whole += [blob(made / "gguf" / "m-mmproj-f16.gguf", "projector")] if projector else []
    for name, layers in (("text", text), ("llava", whole)):
        (library / name).mkdir(parents=True)
        (library / name / "7b").write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": layers}))
    return library / "llava" / "7b", blobs / str(whole[0]["digest"]).replace(":", "-")


def test_a_manifest_and_a_blob_of_ollama_mean_both_files(made: Path, tmp_path: Path) -> None:
    manifest, blob = store(made, tmp_path)
    expected = set(recognise(made / "gguf" / "m-q8_0.gguf").open().tensors())
    assert any(name.startswith("vision_tower.") for name in expected)
    for source in (manifest, blob):
        found = recognise(source)
        assert (found.layout, set(found.open().tensors())) == ("gguf", expected)
    llava_convert.convert(manifest, to="hf", out=tmp_path / "hf", dequantize=True)
    assert llava_convert.verify(made / "gguf" / "m-q8_0.gguf", tmp_path / "hf")


def test_a_model_of_ollama_without_a_projector_is_text_alone(made: Path, tmp_path: Path) -> None:
    manifest, blob = store(made, tmp_path, projector=False)
    for source in (manifest, blob):
        assert recognise(source).open().default_part == "language_model"


def test_a_blob_that_is_missing(made: Path, tmp_path: Path) -> None:
    manifest, blob = store(made, tmp_path)
    blob.unlink()
    with pytest.raises(InputError, match="is not in") as refused:
        recognise(manifest).open()
    assert "ollama pull" in str(refused.value.hint)


def test_two_folders(made: Path, tmp_path: Path) -> None:
    for name in ("m-f16.gguf", "m-mmproj-f16.gguf"):
        (tmp_path / name).mkdir()
        shutil.copy(made / "gguf" / name, tmp_path / name)
    language, eyes = tmp_path / "m-f16.gguf" / "m-f16.gguf", tmp_path / "m-mmproj-f16.gguf" / "m-mmproj-f16.gguf"
    for source in (language, language.parent):
        llava_convert.convert(source, to="hf", out=tmp_path / "hf", mmproj=eyes, force=True)
        assert llava_convert.verify(made / "gguf" / "m-f16.gguf", tmp_path / "hf")
    with pytest.raises(UnsupportedError, match="is not an mmproj"):
        recognise(language).open(OpenOptions(mmproj=language))
    with pytest.raises(UnsupportedError, match="is an mmproj itself"):
        recognise(eyes).open(OpenOptions(mmproj=eyes))
    with pytest.raises(UsageError, match="mmproj does not apply"):
        llava_convert.plan(made / "hf", to="official", mmproj=eyes)


def test_a_folder_of_lm_studio(made: Path, tmp_path: Path) -> None:
    """PUBLISHER/REPO with two files, told apart by what they hold: names and endings may be any."""
    for number, (model, eyes) in enumerate((("Llava.Q8_0.GGUF", "mmproj-model-f16.gguf"), ("b.gguf", "a.gguf"))):
        repo = tmp_path / str(number) / ".lmstudio" / "models" / "some one" / "LLaVA-GGUF"
        repo.mkdir(parents=True)
        shutil.copy(made / "gguf" / "m-q8_0.gguf", repo / model)
        shutil.copy(made / "gguf" / "m-mmproj-f16.gguf", repo / eyes)
        (repo / "model.lmstudio.json").write_text("{}")
        for source in (repo, repo / model):
            found = recognise(source).open()
            assert llava_convert.verify(made / "gguf" / "m-q8_0.gguf", source)
            assert {"vision_tower", "projector", "language_model"} == {n.split(".")[0] for n in found.tensors()}
        # Another type of the model beside it: the file says which is meant, the folder does not.
        shutil.copy(made / "gguf" / "m-f16.gguf", repo / "another.gguf")
        assert recognise(repo / model).open().tensors().keys() == found.tensors().keys()
        with pytest.raises(UnsupportedError, match=r"another\.gguf"):
            recognise(repo).open()


# --- GGUF to itself


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def bytes_in(folder: Path, pattern: str) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for path in sorted(folder.glob(pattern)) for t in GGUFReader(path).tensors}


def test_a_gguf_in_shards_keeps_its_types(made: Path, tmp_path: Path) -> None:
    source = made / "gguf" / "m-q8_0.gguf"
    report = llava_convert.convert(source, to="gguf", max_shard_size="100KB", out=tmp_path / "out", name="m")
    assert report.warnings == ()
    assert len(list((tmp_path / "out").glob("m-q8_0-*-of-*.gguf"))) > 1
    for pattern in ("m-q8_0*.gguf", "m-mmproj-f16.gguf"):
        assert bytes_in(tmp_path / "out", pattern) == bytes_in(made / "gguf", pattern)


def test_another_prompt_in_a_gguf(made: Path, tmp_path: Path) -> None:
    source = made / "gguf" / "m-q8_0.gguf"
    llava_convert.convert(source, to="gguf", prompt_template="vicuna", out=tmp_path / "out", name="m")
    one, other = (GGUFReader(folder / "m-q8_0.gguf") for folder in (made / "gguf", tmp_path / "out"))
    texts = [reader.fields["tokenizer.chat_template"].contents() for reader in (one, other)]
    assert "USER:" in texts[1] and "USER:" not in texts[0]
    assert bytes_in(tmp_path / "out", "m-q8_0.gguf") == bytes_in(made / "gguf", "m-q8_0.gguf")


def test_another_type_of_a_gguf(made: Path, tmp_path: Path) -> None:
    llava_convert.convert(made / "hf", to="gguf", outtype="f16,q8_0", out=tmp_path / "direct", name="m")
    f16 = tmp_path / "direct" / "m-f16.gguf"
    llava_convert.convert(f16, to="gguf", outtype="q8_0", out=tmp_path / "by-f16", name="m")
    assert bytes_in(tmp_path / "by-f16", "m-q8_0.gguf") == bytes_in(tmp_path / "direct", "m-q8_0.gguf")
    quantised = made / "gguf" / "m-q8_0.gguf"
    for kind in ("q4_0", "f16"):
        with pytest.raises(UnsupportedError, match="are quantised") as refused:
            llava_convert.convert(quantised, to="gguf", outtype=kind, out=tmp_path / "out")
        assert "dequantize" in str(refused.value.hint)
    report = llava_convert.convert(
        quantised, to="gguf", outtype="q4_0", dequantize=True, out=tmp_path / "out", name="m"
    )
    assert any("quantised a second time: the error of Q8_0 stays" in warning for warning in report.warnings)
    assert types_in(tmp_path / "out" / "m-q4_0.gguf")["blk.0.ffn_up.weight"] == "Q4_0"
    assert types_in(tmp_path / "out" / "m-mmproj-f16.gguf") == types_in(made / "gguf" / "m-mmproj-f16.gguf")


# --- MLX


def mlx(made: Path, folder: Path) -> Path:
    """The folder as mlx-vlm saves it."""
    shutil.copytree(made / "hf", folder)
    state = load_file(folder / "model.safetensors")
    name = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    state[name] = state[name].permute(0, 2, 3, 1).contiguous()
    save_file(state, folder / "model.safetensors", {"format": "mlx"})
    return folder


@pytest.mark.parametrize("to", ["hf", "official", "gguf"])
def test_what_mlx_saves(made: Path, tmp_path: Path, to: str) -> None:
    folder = mlx(made, tmp_path / "mlx")
    llava_convert.convert(folder, to=to, out=tmp_path / to)
    assert llava_convert.verify(made / "hf", tmp_path / to)
    if to == "hf":
        ours, theirs = (load_file(side / "model.safetensors") for side in (made / "hf", tmp_path / "hf"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- towers without `vision_model.`


def test_a_tower_of_newer_transformers_in_the_xtuner_layout(made: Path, tmp_path: Path) -> None:
    llava_convert.convert(made / "hf", to="xtuner", out=tmp_path / "xtuner")
    file = tmp_path / "xtuner" / "visual_encoder" / "model.safetensors"
    before = recognise(tmp_path / "xtuner").open().tensors()
    state = {name.removeprefix("vision_model."): tensor for name, tensor in load_file(file).items()}
    assert len(state) == len(load_file(file)) and not any(name.startswith("vision_model.") for name in state)
    save_file(state, file)
    assert recognise(tmp_path / "xtuner").open().tensors().keys() == before.keys()
    llava_convert.convert(tmp_path / "xtuner", to="official", out=tmp_path / "official")
    assert llava_convert.verify(made / "hf", tmp_path / "official")


def test_such_a_tower_in_the_official_layout(made: Path, tmp_path: Path) -> None:
    llava_convert.convert(made / "hf", to="official", out=tmp_path / "official")
    file = tmp_path / "official" / "model.safetensors"
    inner = "vision_tower.vision_tower.vision_model."
    state = {name.replace(inner, "vision_tower.vision_tower."): tensor for name, tensor in load_file(file).items()}
    assert not any(inner in name for name in state)
    save_file(state, file)
    llava_convert.convert(tmp_path / "official", to="hf", out=tmp_path / "hf")
    assert llava_convert.verify(tmp_path / "official", tmp_path / "hf")
    assert llava_convert.verify(made / "hf", tmp_path / "official")


def test_such_a_tower_in_a_pth(made: Path, tmp_path: Path) -> None:
    llava_convert.convert(made / "hf", to="pth", out=tmp_path / "pth")
    file = tmp_path / "pth" / "model.pth"
    whole = torch.load(file, weights_only=True)
    flat = {
        name.replace("visual_encoder.vision_model.", "visual_encoder."): t for name, t in whole["state_dict"].items()
    }
    torch.save({**whole, "state_dict": flat}, tmp_path / "flat.pth")
    assert recognise(tmp_path / "flat.pth").open().tensors().keys() == recognise(file).open().tensors().keys()
