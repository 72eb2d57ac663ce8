"""Indexes and folders of weights that are wrong, by the rows of the fault list (14, 22-29, 32).

Rows 30 and 31, as far as they ask for a config.json and compare it with the tensors, belong to the layouts; that JSON
is read with a line and a column is in test_safetensors_faults.py. Row 34 belongs to the command.
"""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llava_convert.core.errors import ConvertError, InputError, UnsafeError, UnsupportedError
from llava_convert.storage.files import relative_name, require_inside
from llava_convert.storage.safetensors import encode_header
from llava_convert.storage.weights import MAX_INDEX_BYTES, open_weights

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_shard(path: Path, *names: str) -> Path:
    header = encode_header([(name, "U8", (1,)) for name in names])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.data + bytes(len(names)))
    return path


def write_index(folder: Path, weight_map: object, name: str = INDEX, **more: object) -> Path:
    path = folder / name
    path.write_text(json.dumps({"weight_map": weight_map, **more}))
    return path


def sharded(folder: Path) -> dict[str, str]:
    write_shard(folder / ONE, "a", "b")
    write_shard(folder / TWO, "c")
    weight_map = {"a": ONE, "b": ONE, "c": TWO}
    write_index(folder, weight_map)
    return weight_map


def refused(source: Path, kind: type[ConvertError]) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        open_weights(source)
    assert type(caught.value) is kind
    assert caught.value.exit_code == {InputError: 3, UnsupportedError: 4, UnsafeError: 5}[kind]
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 4000
    return caught.value


def test_fault_14_tensor_in_two_shards(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    write_shard(tmp_path / TWO, "b", "c")
    write_index(tmp_path, weight_map)
    assert f"tensor b is in two shards: {ONE} and {TWO}" in refused(tmp_path, InputError).message


@pytest.mark.parametrize(
    "value",
    [
        "",
        ".",
        "./",
        "..",
        "../model.safetensors",
        "sub/../../model.safetensors",
        "sub/../model.safetensors",
        "/etc/passwd",
        "//server/share/model.safetensors",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "c:/model.safetensors",
        "\\\\srv\\x\\model.safetensors",
        "sub\\model.safetensors",
        "..\\model.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "\ud800.safetensors",
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_fault_22_weight_map_leaves_the_folder(tmp_path: Path, value: str, by_name: bool) -> None:
    folder = tmp_path / "model"
    write_shard(tmp_path / "model.safetensors", "a")
    write_shard(folder / ONE, "b")
    index = write_index(folder, {"b": ONE, "a": value})
    error = refused(index if by_name else folder, UnsafeError)
    assert f"{index}: weight_map puts a into '" in error.message


@pytest.mark.parametrize(
    "value", ["a.safetensors", "sub/a.safetensors", "a..b.safetensors", "é x.bin", "...bin", "ab:c"]
)
def test_fault_22_plain_names_pass(value: str) -> None:
    assert relative_name(value) == value


@pytest.mark.parametrize("value", [7, None, ["a.safetensors"], {"file": "a.safetensors"}])
def test_fault_22_weight_map_value_is_no_name(tmp_path: Path, value: object) -> None:
    write_index(tmp_path, {"a": value})
    assert "weight_map gives a no file name" in refused(tmp_path, InputError).message


@pytest.mark.parametrize("value", ["config.json", "weights", "model.gguf"])
def test_fault_22_weight_map_names_no_weights(tmp_path: Path, value: str) -> None:
    write_index(tmp_path, {"a": value})
    assert "of no known format" in refused(tmp_path, UnsupportedError).message


def test_fault_23_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    sharded(folder)
    (folder / TWO).rename(tmp_path / "elsewhere.safetensors")
    (folder / TWO).symlink_to(tmp_path / "elsewhere.safetensors")
    error = refused(folder, UnsafeError)
    assert f"{TWO}: is a link that leaves its folder, to {tmp_path / 'elsewhere.safetensors'}" in error.message
    # Nor is it told whether there is anything at the other end.
    (tmp_path / "elsewhere.safetensors").unlink()
    refused(folder, UnsafeError)


def test_fault_23_folder_linked_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_shard(tmp_path / "elsewhere" / "a.safetensors", "a")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    write_index(folder, {"a": "sub/a.safetensors"})
    refused(folder, UnsafeError)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_fault_23_single_file_or_index_is_the_link(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    write_shard(tmp_path / "x.safetensors", "a")
    write_index(tmp_path, {"a": "x.safetensors"}, name="x.json")
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / ("x.json" if name == INDEX else "x.safetensors"))
    refused(folder, UnsafeError)


def test_fault_23_links_that_are_no_danger(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    sharded(folder)
    (folder / TWO).rename(folder / "real.safetensors")
    (folder / TWO).symlink_to("real.safetensors")
    assert set(open_weights(folder).tensors) == {"a", "b", "c"}
    # A link which the user names, to a file or to the whole folder, is the user's own.
    (tmp_path / "link").symlink_to(folder)
    assert set(open_weights(tmp_path / "link").tensors) == {"a", "b", "c"}
    (tmp_path / "link.safetensors").symlink_to(folder / ONE)
    assert set(open_weights(tmp_path / "link.safetensors").tensors) == {"a", "b"}


def cache(tmp_path: Path) -> tuple[Path, Path]:
    """A snapshot as huggingface_hub leaves it: (repository folder, snapshot folder)."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    plain = tmp_path / "plain"
    sharded(plain)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(repository / "blobs" / f"{number:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    return repository, snapshot


def test_fault_23_hub_cache_snapshot(tmp_path: Path) -> None:
    _, snapshot = cache(tmp_path)
    assert set(open_weights(snapshot).tensors) == {"a", "b", "c"}
    assert set(open_weights(snapshot / INDEX).tensors) == {"a", "b", "c"}
    (tmp_path / "link").symlink_to(snapshot)
    assert set(open_weights(tmp_path / "link").tensors) == {"a", "b", "c"}
    # A model in a subfolder of its repository.
    sub = snapshot / "sub"
    sub.mkdir()
    for name in (ONE, TWO, INDEX):
        (sub / name).symlink_to(f"../../../blobs/{(snapshot / name).readlink().name}")
    assert set(open_weights(sub).tensors) == {"a", "b", "c"}


def test_fault_23_hub_cache_of_another_repository(tmp_path: Path) -> None:
    repository, snapshot = cache(tmp_path)
    repository.rename(tmp_path / "hub" / "models--org--other")
    (tmp_path / "hub" / "models--org--other" / "blobs").rename(tmp_path / "hub" / "blobs")
    for name in (ONE, TWO, INDEX):
        link = tmp_path / "hub" / "models--org--other" / "snapshots" / snapshot.name / name
        target = tmp_path / "hub" / "blobs" / link.readlink().name
        link.unlink()
        link.symlink_to(target)
    refused(link.parent, UnsafeError)


@pytest.mark.parametrize("trick", ["blobs is a link", "blob is a link", "no cache", "below blobs"])
def test_fault_23_almost_a_hub_cache(tmp_path: Path, trick: str) -> None:
    repository, snapshot = cache(tmp_path)
    blob = repository / "blobs" / (snapshot / TWO).readlink().name
    if trick == "blobs is a link":
        (repository / "blobs").rename(tmp_path / "secrets")
        (repository / "blobs").symlink_to(tmp_path / "secrets")
    elif trick == "blob is a link":
        blob.rename(tmp_path / "secret")
        blob.symlink_to(tmp_path / "secret")
    elif trick == "no cache":
        repository.rename(repository.with_name("name"))
        snapshot = repository.with_name("name") / "snapshots" / snapshot.name
    else:
        (repository / "blobs" / "sub").mkdir()
        blob.rename(repository / "blobs" / "sub" / blob.name)
        (snapshot / TWO).unlink()
        (snapshot / TWO).symlink_to(f"../../blobs/sub/{blob.name}")
    refused(snapshot, UnsafeError)


def test_fault_23_loop_of_links(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / TWO).unlink()
    (tmp_path / TWO).symlink_to(TWO)
    assert TWO in refused(tmp_path, InputError).message
    with pytest.raises(UnsafeError):
        require_inside(tmp_path / "sub", "../x")


def test_fault_24_missing_shards(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    (tmp_path / TWO).unlink()
    assert f"{INDEX}: 1 of 2 shards are missing: {TWO}" in refused(tmp_path, InputError).message
    many = {f"t{i}": f"model-{i:05}-of-01000.safetensors" for i in range(1000)}
    write_index(tmp_path, {**weight_map, **many})
    error = refused(tmp_path, InputError)
    assert "1001 of 1002 shards are missing: model-00000-of-01000.safetensors, " in error.message
    assert error.message.endswith("and 993 more")


def test_fault_24_blob_missing_in_a_hub_cache(tmp_path: Path) -> None:
    repository, snapshot = cache(tmp_path)
    (repository / "blobs" / (snapshot / TWO).readlink().name).unlink()
    assert f"1 of 2 shards are missing: {TWO}" in refused(snapshot, InputError).message


def test_fault_24_shards_without_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    error = refused(tmp_path, InputError)
    assert f"shards without an index: {ONE}, {TWO}, but no {INDEX}" in error.message
    assert error.hint is not None and INDEX in error.hint
    # Torch files beside them do not settle what was meant.
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "shards without an index" in refused(tmp_path, InputError).message


def test_fault_25_index_and_shard_disagree(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"a": ONE, "gone": ONE, "c": TWO})
    error = refused(tmp_path, InputError)
    assert f"1 tensors are in the index but not in that shard: gone ({ONE})" in error.message
    assert f"1 tensors are in a shard but not so in the index: b ({ONE})" in error.message


def test_fault_25_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"a": ONE, "b": TWO, "c": TWO})
    error = refused(tmp_path, InputError)
    assert f"not in that shard: b ({TWO})" in error.message
    assert f"not so in the index: b ({ONE})" in error.message


@pytest.mark.parametrize(
    ("weight_map", "fragment", "absent"),
    [
        ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, "1 tensors are in the index but not in that shard: d", "in a shard"),
        ({"a": ONE, "c": TWO}, "1 tensors are in a shard but not so in the index: b", "are in the index"),
        ({f"x{i}": ONE for i in range(10_000)}, "x7", "x8"),
    ],
)
def test_fault_25_one_side(tmp_path: Path, weight_map: dict[str, str], fragment: str, absent: str) -> None:
    sharded(tmp_path)
    write_index(tmp_path, weight_map)
    error = refused(tmp_path, InputError)
    assert fragment in error.message
    assert absent not in error.message


def test_fault_25_tensor_twice_in_the_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}')
    assert "the key a is there twice" in refused(tmp_path, InputError).message


def test_fault_26_stale_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_shard(tmp_path / "model.safetensors", "a")
    error = refused(tmp_path, UnsupportedError)
    assert f"ambiguous: model.safetensors and {INDEX} are both there" in error.message
    assert error.hint is not None and str(tmp_path / "model.safetensors") in error.hint
    assert set(open_weights(tmp_path / "model.safetensors").tensors) == {"a"}
    assert set(open_weights(tmp_path / INDEX).tensors) == {"a", "b", "c"}


def test_fault_26_index_of_the_single_file_is_not_stale(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a", "b")
    write_index(tmp_path, {"b": "model.safetensors", "a": "model.safetensors"})
    weights = open_weights(tmp_path)
    assert list(weights.tensors) == ["b", "a"]
    assert weights.warnings == ()


def test_fault_26_two_names_for_weights(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a")
    write_shard(tmp_path / "pytorch_model.safetensors", "a")
    error = refused(tmp_path, UnsupportedError)
    assert "ambiguous: model.safetensors and pytorch_model.safetensors are both there" in error.message


def test_fault_27_both_formats(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    weights = open_weights(tmp_path)
    assert weights.files == (tmp_path / "model.safetensors",)
    assert weights.warnings == (f"{tmp_path} has safetensors and torch files: pytorch_model.bin ignored",)


@pytest.mark.parametrize("claimed", [4, 0, -1, "3", 3.5, [3]])
def test_fault_28_total_size_is_wrong(tmp_path: Path, claimed: object) -> None:
    weight_map = sharded(tmp_path)
    write_index(tmp_path, weight_map, metadata={"total_size": claimed})
    weights = open_weights(tmp_path)
    assert set(weights.tensors) == {"a", "b", "c"}
    assert weights.warnings == (f"{tmp_path / INDEX}: total_size says {claimed}, the tensors have 3 bytes; ignored",)


@pytest.mark.parametrize("metadata", [{"total_size": 3}, {"total_size": 3.0}, {}, None, [], "x"])
def test_fault_28_nothing_to_warn_of(tmp_path: Path, metadata: object) -> None:
    weight_map = sharded(tmp_path)
    write_index(tmp_path, weight_map, metadata=metadata)
    assert open_weights(tmp_path).warnings == ()


@pytest.mark.parametrize(
    "content", ["[]", "null", '"x"', "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}']
)
def test_fault_29_no_index(tmp_path: Path, content: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(content)
    assert "not an index" in refused(tmp_path, InputError).message


def bounded(source: Path) -> str:
    """The message of the error, which must come within a few seconds and 600 MB."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        message = refused(source, InputError).message
        assert tracemalloc.get_traced_memory()[1] < 600 << 20
        assert time.process_time() - begun < 30  # tracing alone makes it some times slower
    finally:
        tracemalloc.stop()
    return message


def test_fault_29_gigabyte_of_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    with (tmp_path / INDEX).open("wb") as stream:
        stream.truncate(1 << 30)
    assert f"larger than {MAX_INDEX_BYTES:,} bytes" in bounded(tmp_path)


@pytest.mark.slow
def test_fault_29_million_entries(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {f"model.layers.{i}": ONE for i in range(1_000_000)})
    assert "1,000,000 tensors, more than 200,000" in bounded(tmp_path)


@pytest.mark.parametrize("broken", [INDEX, TWO])
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_fault_32_shard_or_index_is_no_file(tmp_path: Path, broken: str, kind: str) -> None:
    sharded(tmp_path)
    (tmp_path / broken).unlink()
    if kind == "fifo":
        os.mkfifo(tmp_path / broken)
    else:
        (tmp_path / broken).mkdir()
    begun = time.process_time()
    assert f"{broken}: is a {'pipe' if kind == 'fifo' else 'folder'}" in refused(tmp_path, InputError).message
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("name", ["pytorch_model.bin", "iter_2.pth"])
def test_fault_32_torch_file_is_a_fifo(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "is a pipe" in refused(tmp_path / name, InputError).message


def test_fault_32_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    assert "cannot be listed: Permission denied" in refused(tmp_path, InputError).message


def test_fault_76_many_shards_of_one_tensor(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(500)]
    for name in names:
        write_shard(tmp_path / f"{name}.safetensors", name)
    write_index(tmp_path, {name: f"{name}.safetensors" for name in names})
    weights = open_weights(tmp_path)
    assert list(weights.tensors) == names
    assert len(weights.files) == 500
