"""The torch reader against torch.load, bit for bit, and against real files."""

from __future__ import annotations

import itertools
import os
import time
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_convert.core.errors import InputError, UnsupportedError
from llava_convert.core.tensors import DTYPE_BITS, StoredTensor
from llava_convert.storage.pickle.machine import Elided, Inert
from llava_convert.storage.torch.file import OddTensor, TorchFile, read_torch, state_dict

GOLDEN = Path(__file__).parents[3].parent / "shared" / "golden"
TORCH_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def read_bytes(tensor: StoredTensor) -> bytes:
    """The tensor's elements in row-major order, read by its extents and strides alone."""
    data = b""
    for extent in tensor.extents:
        with extent.path.open("rb") as stream:
            stream.seek(extent.offset)
            part = stream.read(extent.length)
        assert len(part) == extent.length
        data += part
    if tensor.strides is None:
        assert len(data) == tensor.nbytes
        return data
    item = DTYPE_BITS[tensor.dtype] // 8
    flat = np.frombuffer(data, dtype=f"V{item}")
    steps = tuple(item * step for step in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, steps).tobytes()


def oracle_bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().contiguous().clone()
    raw = torch.empty(0, dtype=torch.uint8).set_(plain.untyped_storage())  # type: ignore[call-overload]
    return bytes(raw.numpy().tobytes()[: plain.numel() * plain.element_size()])


def random_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Any bit pattern, so that NaN payloads and every code of a small float occur."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).bool()
    item = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    count = int(np.prod(shape, dtype=np.int64))
    raw = torch.randint(0, 256, (count * item,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def save(value: Any, path: Path, legacy: bool = False, **options: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy, **options)
    return path


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, StoredTensor)
        assert ours.dtype == TORCH_DTYPES[theirs.dtype]
        assert ours.shape == tuple(theirs.shape)
        assert (ours.strides is None) == theirs.is_contiguous()
        assert read_bytes(ours) == oracle_bytes(theirs)
    elif isinstance(theirs, dict):
        assert type(ours) is dict and list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
            if isinstance(ours[key], StoredTensor) and isinstance(key, str):
                assert ours[key].name == key
    elif isinstance(theirs, list | tuple) and not isinstance(theirs, torch.Size):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs and type(ours) in (type(theirs), tuple)


def assert_reads_like_torch(value: Any, path: Path, legacy: bool = False) -> TorchFile:
    """Save `value`; what is read equals both it and what torch.load reads."""
    file = read_torch(save(value, path, legacy))
    assert_same(file.root, value)
    try:
        theirs = torch.load(path, weights_only=False)
    except AttributeError:  # torch 2.13 writes the newest dtypes in the old form and cannot read them back
        assert legacy
    else:
        assert_same(file.root, theirs)
    return file


@LEGACY
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_bit_for_bit(tmp_path: Path, dtype: torch.dtype, legacy: bool) -> None:
    value = {"a": random_tensor(dtype, 3, 5), "zero_d": random_tensor(dtype, seed=1)}
    value["none"] = random_tensor(dtype, 0, 4)
    file = assert_reads_like_torch(value, tmp_path / "x.pth", legacy)
    assert file.stubs == () and file.byteorder == "little"
    assert file.root["a"].strides is None and file.root["zero_d"].shape == ()


@LEGACY
def test_fault_41_views_are_exact(tmp_path: Path, legacy: bool) -> None:
    base = random_tensor(torch.float32, 6, 8)
    value = {
        "base": base, "t": base.T, "rows": base[2:5], "columns": base[:, 3:7], "step": base[::2, 1::3],
        "expanded": base[1].expand(4, 8), "expanded_scalar": base[3, 3].expand(2, 3), "select": base[:, 2],
        "diagonal": base.diagonal(), "permuted": base.reshape(2, 3, 8).permute(2, 0, 1), "one": base[1:2, ::2],
        "empty_view": base[6:],
    }  # fmt: skip
    file = assert_reads_like_torch(value, tmp_path / "x.pth", legacy)
    tensors = state_dict(file).tensors
    assert tensors["t"].strides == (1, 8)
    assert tensors["expanded"].strides == (0, 1) and tensors["expanded"].extents[0].length == 8 * 4
    assert tensors["expanded_scalar"].extents[0].length == 4
    assert tensors["rows"].strides is None
    assert tensors["rows"].extents[0].offset == tensors["base"].extents[0].offset + 2 * 8 * 4
    assert tensors["columns"].extents[0].length == (5 * 8 + 4) * 4
    assert tensors["base"].extents == tensors["t"].extents


@LEGACY
def test_shared_parameters_and_nesting(tmp_path: Path, legacy: bool) -> None:
    weight = torch.nn.Parameter(random_tensor(torch.bfloat16, 4, 4))
    with_state = torch.nn.Parameter(torch.ones(2))
    with_state.note = "kept by torch as an attribute"  # type: ignore[attr-defined]
    value = OrderedDict(
        first=weight,
        second=weight,
        nested=[{"deep": (torch.arange(3), {1, 2}, frozenset({"x"}))}, torch.Size([1, 2])],
        numbers=[0, -1, 255, 256, 65536, -(2**31), 2**40, 2**70, 1.5, float("inf"), True, None],
        texts=["", "模型", "line\nbreak", "e\u0301", "\U0001f600"],
        groups=defaultdict(list, {"a": [1]}),
        with_state=with_state,
    )
    file = read_torch(save(value, tmp_path / "x.pth", legacy))
    root = file.root
    assert root["first"].extents == root["second"].extents
    assert (root["first"].name, root["second"].name) == ("first", "second")
    assert read_bytes(root["first"]) == oracle_bytes(weight)
    deep = root["nested"][0]["deep"]
    assert read_bytes(deep[0]) == oracle_bytes(torch.arange(3)) and deep[0].name == ""
    assert deep[1] == {1, 2} and deep[2] == frozenset({"x"})
    assert root["nested"][1] == (1, 2)
    assert root["numbers"] == value["numbers"] and root["texts"] == value["texts"]
    assert root["groups"] == {"a": [1]}
    assert read_bytes(root["with_state"]) == oracle_bytes(with_state)
    assert list(state_dict(file).tensors) == ["first", "second", "with_state"]
    assert state_dict(file).ignored == ("nested", "numbers", "texts", "groups")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    value = {"a": torch.arange(7), "s": {"x"}, "f": frozenset([1]), "b": [b"raw", 3.5, "é" * 300, -5, 2**33]}
    root = read_torch(save(value, tmp_path / "x.pth", pickle_protocol=protocol)).root
    assert_same(root["a"], value["a"])
    assert root["s"] == {"x"} and root["f"] == frozenset([1])
    assert root["b"][1:] == value["b"][1:]
    assert root["b"][0] == b"raw" if protocol > 2 else root["b"][0].name == "_codecs.encode"


def test_unicode_file_name_and_space(tmp_path: Path) -> None:
    path = tmp_path / "模型 é.pth"
    assert_reads_like_torch({"a": torch.arange(3)}, path)


def test_crc_switched_off(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"a": torch.arange(3)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("x/data.pkl").CRC == 0
    assert_same(read_torch(path).root, {"a": torch.arange(3)})


def test_objects_become_inert_and_keep_what_they_hold(tmp_path: Path) -> None:
    value = {"w": torch.ones(2), "scalar": np.float64(2.5), "array": np.arange(3), "path": Path("a/b")}
    value["range"] = range(9)
    file = read_torch(save(value, tmp_path / "x.pth"))
    assert isinstance(file.root["scalar"], Inert) and isinstance(file.root["array"], Inert)
    assert file.root["range"].name == "builtins.range" and file.root["range"].args == (0, 9, 1)
    assert any(name.endswith("multiarray.scalar") for name in file.stubs)
    assert "builtins.range" not in file.stubs
    assert state_dict(file).ignored == ("scalar", "array", "path", "range")


def test_long_text_is_not_kept(tmp_path: Path) -> None:
    value = {"w": torch.ones(1), "log": "x" * (1 << 20 | 1), "short": "y" * 1000}
    root = read_torch(save(value, tmp_path / "x.pth")).root
    assert root["log"] == Elided(1 << 20 | 1) and root["short"] == "y" * 1000


def test_odd_tensors_block_only_where_they_are_asked_for(tmp_path: Path) -> None:
    warnings.simplefilter("ignore")
    odd = {
        "quantised": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "meta (without data)": torch.ones(2, device="meta"),
        "torch.ComplexDoubleStorage": torch.ones(2, dtype=torch.complex128),
        "torch.complex32": torch.ones(2, dtype=torch.complex64).to(torch.complex32),
        "conjugated or negated view": torch.ones(2, dtype=torch.complex64).conj(),
    }
    file = read_torch(save({"state_dict": {"w": torch.ones(2)}, "optimizer": odd}, tmp_path / "a.pth"))
    assert list(state_dict(file).tensors) == ["w"]
    for kind in odd:
        assert file.root["optimizer"][kind] == OddTensor(kind)
    for number, (kind, tensor) in enumerate(odd.items()):
        path = save({"w": torch.ones(2), "bad.weight": tensor}, tmp_path / f"{number}.pth")
        with pytest.raises(UnsupportedError) as caught:
            state_dict(read_torch(path))
        assert "bad.weight" in caught.value.message and kind in caught.value.message


def test_a_pickled_module_is_named(tmp_path: Path) -> None:
    file = read_torch(save(torch.nn.Linear(2, 2), tmp_path / "x.pth"))
    with pytest.raises(UnsupportedError, match=r"torch\.nn\.modules\.linear\.Linear"):
        state_dict(file)


W = {"a": torch.ones(1), "b": torch.ones(2)}


@pytest.mark.parametrize(
    ("value", "unwrapped"),
    [
        (W, ()),
        ({"state_dict": W, "meta": {}}, ("state_dict",)),
        ({"model": W, "optimizer": {}}, ("model",)),
        ({"module": W}, ("module",)),
        ({"model": {"state_dict": W}}, ("model", "state_dict")),
        ({f"module.{k}": v for k, v in W.items()}, ("module.",)),
        ({f"_orig_mod.{k}": v for k, v in W.items()}, ("_orig_mod.",)),
        ({"state_dict": {f"module._orig_mod.{k}": v for k, v in W.items()}}, ("state_dict", "module.", "_orig_mod.")),
    ],
    ids=["plain", "state_dict", "model", "module", "two", "ddp", "compiled", "all"],
)
def test_fault_43_wrappers_are_taken_off_and_told(tmp_path: Path, value: Any, unwrapped: tuple[str, ...]) -> None:
    weights = state_dict(read_torch(save(value, tmp_path / "x.pth")))
    assert weights.unwrapped == unwrapped
    assert {name: tensor.shape for name, tensor in weights.tensors.items()} == {"a": (1,), "b": (2,)}
    assert [tensor.name for tensor in weights.tensors.values()] == ["a", "b"]


def test_fault_43_a_prefix_that_some_keys_lack_stays(tmp_path: Path) -> None:
    weights = state_dict(read_torch(save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pth")))
    assert weights.unwrapped == () and list(weights.tensors) == ["module.a", "b"]


def test_a_tensor_called_model_is_no_wrapper(tmp_path: Path) -> None:
    weights = state_dict(read_torch(save({"model": torch.ones(1), "state_dict": {"x": torch.ones(1)}}, tmp_path / "x")))
    assert list(weights.tensors) == ["model"] and weights.ignored == ("state_dict",)


@pytest.mark.parametrize("value", [{}, {"state_dict": {}}, {"meta": {"epoch": 1}}, {"state_dict": {"a": 1}}], ids=str)
def test_no_tensor_at_all(tmp_path: Path, value: Any) -> None:
    file = read_torch(save(value, tmp_path / "x.pth"))
    with pytest.raises(InputError, match="no tensor"):
        state_dict(file)


def test_zero_elements_are_kept_for_the_caller_to_judge(tmp_path: Path) -> None:
    weights = state_dict(read_torch(save({"module": {"a": torch.empty(0)}}, tmp_path / "x.pth")))
    assert weights.tensors["a"].shape == (0,) and weights.tensors["a"].nbytes == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_differential_random_views(tmp_path: Path, data: st.DataObject) -> None:
    dtypes = st.sampled_from(list(TORCH_DTYPES))
    value: dict[str, Any] = {}
    names = data.draw(st.lists(st.text(min_size=1, max_size=8), unique=True, min_size=1, max_size=5))
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            continue
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        tensor = random_tensor(data.draw(dtypes), *shape, seed=data.draw(st.integers(0, 99)))
        for _ in range(data.draw(st.integers(0, 3))):
            if not tensor.dim():
                break
            axis = data.draw(st.integers(0, tensor.dim() - 1))
            step = data.draw(st.sampled_from(["slice", "transpose", "select", "expand", "unsqueeze", "share"]))
            if step == "slice":
                start = data.draw(st.integers(0, tensor.shape[axis]))
                span = [slice(None)] * tensor.dim()
                span[axis] = slice(start, None, data.draw(st.integers(1, 3)))
                tensor = tensor[tuple(span)]
            elif step == "transpose":
                tensor = tensor.transpose(axis, 0)
            elif step == "select" and tensor.shape[axis]:
                tensor = tensor.select(axis, data.draw(st.integers(0, tensor.shape[axis] - 1)))
            elif step == "expand":
                tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
            elif step == "unsqueeze":
                tensor = tensor.unsqueeze(axis)
            else:
                value[f"{name} shared"] = tensor
        value[name] = torch.nn.Parameter(tensor) if data.draw(st.booleans()) and tensor.is_floating_point() else tensor
    legacy = data.draw(st.booleans())
    assert_reads_like_torch(value, tmp_path / "x.pth", legacy)


def test_zip64_beyond_4_gib(tmp_path: Path) -> None:
    """A sparse archive in which data, their headers and the directory lie beyond 4 GiB."""
    source = save({"a": torch.arange(5), "b": torch.full((3,), 2.5)}, tmp_path / "x.pth")
    path = tmp_path / "big.pth"
    with zipfile.ZipFile(source) as archive, path.open("wb") as stream, zipfile.ZipFile(stream, "w") as target:
        for number, info in enumerate(archive.infolist()):
            if number == 3:  # leave a hole: the next record's header begins beyond 4 GiB
                stream.seek((5 << 30) + 7)
                target.start_dir = stream.tell()
            target.writestr(info.filename, archive.read(info))
    assert path.stat().st_size > 5 << 30
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("the file system has no sparse files")
    assert_same(read_torch(path).root, torch.load(source))
    with path.open("rb") as stream:
        stream.seek(-200, os.SEEK_END)
        assert b"PK\x06\x06" in stream.read()


def test_zip64_record_of_5_gib(tmp_path: Path) -> None:
    path = tmp_path / "big.pth"
    count = (5 << 30) // 4
    # What torch.save would write for a tensor of 5 GiB, from one of 4 elements: only its counts differ.
    small = save({"a": torch.arange(4, dtype=torch.int32)}, tmp_path / "x.pth")
    with zipfile.ZipFile(small) as archive:
        pickled = archive.read("x/data.pkl")
    wide = b"\x8a\x05" + count.to_bytes(5, "little")
    assert pickled.count(b"K\x04") == 2  # the storage's numel and the shape
    with path.open("wb") as stream, zipfile.ZipFile(stream, "w") as target:
        target.writestr("x/data.pkl", pickled.replace(b"K\x04", wide))
        info = zipfile.ZipInfo("x/data/0")
        with target.open(info, "w", force_zip64=True) as record:
            stream.seek(count * 4 - 4, os.SEEK_CUR)
            stream.write(b"\1\2\3\4")
            record._file_size = count * 4  # type: ignore[attr-defined]
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("the file system has no sparse files")
    (extent,) = read_torch(path).root["a"].extents
    assert extent.length == 5 << 30
    with path.open("rb") as stream:
        stream.seek(extent.offset + extent.length - 4)
        assert stream.read(4) == b"\1\2\3\4"


def test_index_of_a_large_checkpoint_is_fast(tmp_path: Path) -> None:
    """Not a benchmark: an order of magnitude above what it takes (0.3 s), to catch a quadratic step."""
    weights = {f"llm.model.layers.{n}.mlp.gate_proj.weight": torch.ones(2, 2) for n in range(1500)}
    adam = {n: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)} for n in range(1500)}
    path = save({"state_dict": weights, "optimizer": {"state": adam}}, tmp_path / "x.pth")
    start = time.process_time()
    assert len(state_dict(read_torch(path)).tensors) == 1500
    assert time.process_time() - start < 5


def golden_files() -> list[Path]:
    return sorted(
        itertools.chain(GOLDEN.glob("cases/*/pth/*.pth"), GOLDEN.glob("cases/*/zero*/*.pth/*.pt")),
    )


needs_golden = pytest.mark.skipif(not golden_files(), reason=f"no golden files at {GOLDEN.name}/")


@needs_golden
@pytest.mark.parametrize("path", golden_files(), ids=lambda path: "/".join(path.parts[-4:]))
def test_golden_files_read_without_their_classes(path: Path) -> None:
    file = read_torch(path)
    if path.suffix == ".pth":
        assert "mmengine.logging.history_buffer.HistoryBuffer" in file.stubs
        assert list(file.root) == ["meta", "state_dict", "message_hub", "optimizer", "param_schedulers"]
        assert isinstance(file.root["meta"]["cfg"], str) and "llava" in file.root["meta"]["cfg"].lower()
        count = {"a": 61, "b": 68, "c": 4, "d": 80}[path.parts[-3][0]]
        assert len(state_dict(file).tensors) == count
        assert all(tensor.dtype == "F32" for tensor in state_dict(file).tensors.values())
    elif path.name.endswith("model_states.pt"):
        assert state_dict(file).unwrapped == ("module",)
        assert isinstance(file.root["sparse_tensor_module_names"], set)
        assert all(type(size) is tuple for group in file.root["param_shapes"] for size in group.values())
        assert file.root["ds_config"]["bf16"] == {"enabled": True}  # a ConfigDict, read as a dict
    else:
        assert "deepspeed.runtime.zero.config.ZeroStageEnum" in file.stubs
        inner = file.root["optimizer_state_dict"]
        stage_3 = "fp32_flat_groups" in inner
        groups = inner["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"]
        assert all(isinstance(group, StoredTensor) and group.dtype == "F32" for group in groups)
        stage = inner["zero_stage"]
        assert isinstance(stage, Inert) and stage.args == (3 if stage_3 else 2,)


@needs_golden
@pytest.mark.parametrize("path", golden_files(), ids=lambda path: "/".join(path.parts[-4:]))
def test_golden_tensors_against_torch(path: Path) -> None:
    """torch reads the same bytes, by an unpickler that stubs the classes which are not installed."""
    import pickle
    import types

    class Stub(dict):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*[arg for arg in args if isinstance(arg, dict)])

        def __setstate__(self, state: Any) -> None:
            pass

        min = max = mean = current = statistics = update = register_statistics = None

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return Stub if module.startswith(("mmengine", "deepspeed")) else super().find_class(module, name)

    module = types.SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="stubbing")
    theirs = torch.load(path, pickle_module=module, weights_only=False)

    def compare(ours: Any, other: Any) -> int:
        if isinstance(other, torch.Tensor):
            assert isinstance(ours, StoredTensor) and read_bytes(ours) == oracle_bytes(other)
            return 1
        if isinstance(other, dict) and isinstance(ours, dict):
            return sum(compare(ours[key], value) for key, value in other.items())
        if isinstance(other, list | tuple) and isinstance(ours, list | tuple):
            return sum(compare(one, two) for one, two in zip(ours, other, strict=True))
        return 0

    assert compare(read_torch(path).root, theirs) >= 1
