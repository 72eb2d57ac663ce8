"""Weights found in folders, files and indexes of both formats; what a source was, and that it stayed so."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.storage.fingerprints import Snapshot, identity
from llava_convert.storage.json_files import parse_json
from llava_convert.storage.safetensors import read_header
from llava_convert.storage.weights import Weights, open_weights

TENSORS = {
    "model.embed_tokens.weight": torch.arange(6, dtype=torch.float16).reshape(3, 2),
    "model.norm.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "lm_head.weight": torch.arange(4, dtype=torch.float32).reshape(2, 2),
}
TOTAL = 12 + 4 + 16


def save(path: Path, *names: str) -> None:
    tensors = {name: TENSORS[name] for name in names or TENSORS}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    else:
        torch.save(tensors, path)


def save_sharded(folder: Path, suffix: str = ".safetensors", stem: str = "model") -> dict[str, str]:
    """Two shards and an index, in module order, which is not that of the files."""
    one, two = f"{stem}-00001-of-00002{suffix}", f"{stem}-00002-of-00002{suffix}"
    save(folder / one, "model.embed_tokens.weight", "lm_head.weight")
    save(folder / two, "model.norm.weight")
    weight_map = {"model.embed_tokens.weight": one, "model.norm.weight": two, "lm_head.weight": one}
    index = {"metadata": {"total_size": TOTAL}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return weight_map


def contents(weights: Weights) -> dict[str, bytes]:
    """The bytes that the extents point at."""
    found = {}
    for name, tensor in weights.tensors.items():
        (extent,) = tensor.extents
        assert extent.path == weights.root / weights.shard_of[name]
        found[name] = extent.path.read_bytes()[extent.offset : extent.offset + extent.length]
    return found


EXPECTED = {name: bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "model.bin"])
def test_single_file_in_a_folder(tmp_path: Path, name: str) -> None:
    save(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    weights = open_weights(tmp_path)
    assert contents(weights) == EXPECTED
    assert weights.root == tmp_path
    assert weights.files == (tmp_path / name,)
    assert weights.shard_of == dict.fromkeys(weights.tensors, name)
    assert sum(tensor.nbytes for tensor in weights.tensors.values()) == TOTAL
    assert weights.warnings == ()


@pytest.mark.parametrize("name", ["any name.safetensors", "x.SAFETENSORS", "mm_projector.bin", "iter_2.pth", "w.pt"])
def test_single_file_by_name(tmp_path: Path, name: str) -> None:
    save(tmp_path / name.lower())
    (tmp_path / name.lower()).rename(tmp_path / name)
    weights = open_weights(tmp_path / name)
    assert contents(weights) == EXPECTED
    assert weights.warnings == ()


@pytest.mark.parametrize(("suffix", "stem"), [(".safetensors", "model"), (".bin", "pytorch_model")])
@pytest.mark.parametrize("by_name", [False, True])
def test_shards(tmp_path: Path, suffix: str, stem: str, by_name: bool) -> None:
    weight_map = save_sharded(tmp_path, suffix, stem)
    weights = open_weights(tmp_path / f"{stem}{suffix}.index.json" if by_name else tmp_path)
    assert contents(weights) == EXPECTED
    assert list(weights.tensors) == list(weight_map)
    assert weights.shard_of == weight_map
    assert weights.files == tuple(tmp_path / shard for shard in sorted(set(weight_map.values())))
    assert sum(tensor.nbytes for tensor in weights.tensors.values()) == TOTAL
    assert weights.warnings == ()


def test_only_the_index_says_what_shards_are_called(tmp_path: Path) -> None:
    save(tmp_path / "b.safetensors", "model.norm.weight")
    save(tmp_path / "sub" / "a.safetensors", "lm_head.weight")
    save(tmp_path / "model-00001-of-00002.safetensors")  # not named, so not read
    weight_map = {"model.norm.weight": "./b.safetensors", "lm_head.weight": "sub//a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights = open_weights(tmp_path)
    assert weights.shard_of == {"model.norm.weight": "b.safetensors", "lm_head.weight": "sub/a.safetensors"}
    assert weights.files == (tmp_path / "b.safetensors", tmp_path / "sub" / "a.safetensors")
    assert weights.warnings == ()


def test_adapter(tmp_path: Path) -> None:
    save(tmp_path / "adapter_model.safetensors")
    assert open_weights(tmp_path, stems=("adapter_model",)).files == (tmp_path / "adapter_model.safetensors",)
    with pytest.raises(InputError, match=r"no weights: looked for model\.safetensors") as caught:
        open_weights(tmp_path)
    assert caught.value.hint == "this is an adapter; it needs its base model"
    (tmp_path / "adapter_model.safetensors").unlink()
    save(tmp_path / "adapter_model.bin")
    assert open_weights(tmp_path, stems=("adapter_model",)).files == (tmp_path / "adapter_model.bin",)


def test_wrapped_torch_file_says_so(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS}, tmp_path / "pytorch_model.bin")
    weights = open_weights(tmp_path)
    assert contents(weights) == EXPECTED
    assert weights.warnings == ("pytorch_model.bin: weights taken from within state_dict",)


def test_one_shard_by_name(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    weights = open_weights(tmp_path / "model-00002-of-00002.safetensors")
    assert list(weights.tensors) == ["model.norm.weight"]
    assert weights.warnings == ("model-00002-of-00002.safetensors is one shard of 00002; the others are left out",)
    save(tmp_path / "model-00001-of-00001.safetensors")
    assert open_weights(tmp_path / "model-00001-of-00001.safetensors").warnings == ()


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sharded(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in (Path(), Path("model.safetensors.index.json"), Path("..") / tmp_path.name):
        assert contents(open_weights(path)) == EXPECTED


def test_unknown_suffix_and_missing_source(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="not known as a file of weights"):
        open_weights(tmp_path / "model.ckpt")
    with pytest.raises(InputError, match="no such file"):
        open_weights(tmp_path / "gone.ckpt")
    with pytest.raises(InputError, match="no weights"):
        open_weights(tmp_path)


def test_golden_folders(golden: Path) -> None:
    case = golden / "cases" / "a_full_vitlora"
    for layout in ("official", "huggingface", "xtuner"):
        weights = open_weights(case / layout)
        assert sum(tensor.nbytes for tensor in weights.tensors.values()) > 0


def test_identity_of_safetensors_is_its_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path)
    content = path.read_bytes()
    header = content[: read_header(path).data_start]
    expected = {"file": "model.safetensors", "size": len(content), "sha256": hashlib.sha256(header).hexdigest()}
    assert identity([path]) == [{**expected, "of": "header"}]
    assert identity([]) == []


@pytest.mark.parametrize("size", [0, 10, (1 << 20) + 7, 2 << 20, 5 << 20])
def test_identity_of_other_files_is_their_ends(tmp_path: Path, size: int) -> None:
    path = tmp_path / "iter_2.pth"
    content = os.urandom(size)
    path.write_bytes(content)
    hashed = content if size <= 2 << 20 else content[: 1 << 20] + content[-1 << 20 :]
    expected = {"file": "iter_2.pth", "size": size, "sha256": hashlib.sha256(hashed).hexdigest(), "of": "ends"}
    assert identity([path]) == [expected]


def test_identity_of_a_torch_zip_knows_its_weights(tmp_path: Path) -> None:
    """Since its directory has their CRC, even where the weights themselves are far from both ends."""
    digests = set()
    for value in (1.0, 2.0):
        weights = {"a": torch.zeros(1 << 20), "b": torch.zeros(1 << 20), "c": torch.zeros(1 << 20)}
        weights["b"][5] = value
        path = tmp_path / f"{value}" / "iter_2.pth"
        path.parent.mkdir()
        torch.save(weights, path)
        assert len(zipfile.ZipFile(path).namelist()) > 3
        digests.add(identity([path])[0]["sha256"])
    assert len(digests) == 2


def test_fault_72_source_unchanged(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    weights = open_weights(tmp_path)
    snapshot = Snapshot.take(weights.files)
    assert snapshot.identity == identity(weights.files)
    for path in weights.files:
        path.read_bytes()
    snapshot.recheck()


def test_fault_72_source_truncated(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path)
    snapshot = Snapshot.take([path])
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match=r"model\.safetensors: changed while it was read: its size changed") as caught:
        snapshot.recheck()
    assert caught.value.exit_code == 3


def test_fault_72_source_written_exchanged_removed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path)
    snapshot = Snapshot.take([path])
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(InputError, match="it was written or exchanged"):
        snapshot.recheck()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    snapshot.recheck()
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    with pytest.raises(InputError, match="it was written or exchanged"):
        snapshot.recheck()
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        snapshot.recheck()


def test_fault_72_header_written_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path)
    snapshot = Snapshot.take([path])
    before = path.stat()
    with path.open("r+b") as stream:
        content = stream.read().replace(b"lm_head", b"lm_tail")
        stream.seek(0)
        stream.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    snapshot.recheck_states()
    with pytest.raises(InputError, match="its header changed"):
        snapshot.recheck()


@pytest.mark.parametrize("kind", ["safetensors", "bin", "index", "shards"])
def test_more_tensors_than_any_model_has(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one file, and of all of a model's together: each shard alone may hold few."""
    monkeypatch.setattr("llava_convert.core.tensors.MAX_TENSORS", 3)
    names = [f"t{n}" for n in range(4)]
    held = {name: torch.zeros(1) for name in names}
    if kind == "safetensors":
        safetensors.torch.save_file(held, tmp_path / "model.safetensors")
    elif kind == "bin":
        torch.save(held, tmp_path / "pytorch_model.bin")
    else:
        files = {name: f"s{n % 2 if kind == 'shards' else 0}.safetensors" for n, name in enumerate(names[:3])}
        for file in set(files.values()):
            safetensors.torch.save_file(
                {**{n: held[n] for n in names[:3] if files[n] == file}, file: torch.zeros(1)}, tmp_path / file
            )
        index = files if kind == "shards" else dict.fromkeys(names, "s0.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(InputError, match=r"[45] tensors, more than 3"):
        open_weights(tmp_path, stems=("model", "pytorch_model"))


@pytest.mark.parametrize("number", ["1e400", "-1E+999", "9" * 400 + ".0"])
def test_a_number_beyond_any_float(number: str) -> None:
    """Python reads an infinity there, and would write `Infinity`, which is no JSON."""
    for text in (number, f"[{number}]", f'{{"x": [1, "a", {number}]}}', f'{{"x": [{{"y": {number}}}]}}'):
        with pytest.raises(InputError, match=r"config\.json: not JSON that a model needs: a number beyond any float"):
            parse_json(text.encode(), "config.json")
    assert parse_json(b'{"x": 1e308, "y": 1e-400}', "config.json") == {"x": 1e308, "y": 0.0}
