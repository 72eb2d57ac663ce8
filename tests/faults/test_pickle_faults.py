"""Hostile and damaged files of torch.save: rows 35 to 42 of the fault list (and 1, 19, 20, 32 where they apply).

Every hostile pickle would create the canary if any of it ran.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava_convert.core.errors import ConvertError, InputError, UnsafeError, UnsupportedError
from llava_convert.core.tensors import StoredTensor
from llava_convert.storage.pickle import machine
from llava_convert.storage.pickle.limits import MAX_OPCODES
from llava_convert.storage.pickle.machine import Inert
from llava_convert.storage.torch.file import read_torch, state_dict

STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def tensor(
    offset: int = 0, size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", storage: bytes = STORAGE
) -> bytes:
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    return head + b"J" + struct.pack("<i", offset) + size + stride + b"\x89}tR"


def archive(path: Path, pickled: bytes, *, data: bytes = bytes(range(16)), root: str = "archive") -> Path:
    """What torch.save writes around a pickle, with one storage of 16 bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        target.writestr(f"{root}/data.pkl", pickled)
        target.writestr(f"{root}/byteorder", "little")
        target.writestr(f"{root}/data/0", data)
        target.writestr(f"{root}/version", "3\n")
    return path


def refusal(path: Path, kind: type[ConvertError], *fragments: str) -> ConvertError:
    """The error that reading gives; its message is one printable line that names the file."""
    before = path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 24 else b""
    with pytest.raises(ConvertError) as caught:
        state_dict(read_torch(path))
    error = caught.value
    assert type(error) is kind or (kind is InputError and isinstance(error, InputError)), error.message
    assert str(path) in error.message and error.message.isprintable()
    for fragment in fragments:
        assert fragment in error.message
    assert not before or path.read_bytes() == before
    return error


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


# -- 35: nothing is called -----------------------------------------------------------------------------------------

ATTACKS: dict[str, Callable[[bytes], bytes]] = {
    "global": lambda cmd: b"cos\nsystem\n" + cmd + b"\x85R",
    "global-posix": lambda cmd: b"cposix\nsystem\n" + cmd + b"\x85R",
    "global-nt": lambda cmd: b"cnt\nsystem\n" + cmd + b"\x85R",
    "global-unused": lambda cmd: b"cos\nsystem\n0N",
    "global-in-dict": lambda cmd: b"}" + text("x") + b"cos\nsystem\ns",
    "global-dotted": lambda cmd: b"ctorch.serialization\nos.system\n" + cmd + b"\x85R",
    "global-collections-sys": lambda cmd: b"ccollections\nabc.sys\n" + cmd + b"\x85R",
    "global-module-itself": lambda cmd: b"ctorch.serialization\nos\n" + cmd + b"\x85R",
    "stack-global": lambda cmd: text("os") + text("system") + b"\x93" + cmd + b"\x85R",
    "stack-global-memo": lambda cmd: text("os") + b"q\0000" + b"h\0" + text("system") + b"\x93" + cmd + b"\x85R",
    "stack-global-dotted": lambda cmd: text("os.path") + text("os.system") + b"\x93" + cmd + b"\x85R",
    "inst": lambda cmd: b"(" + cmd + b"ios\nsystem\n",
    "obj": lambda cmd: b"(cos\nsystem\n" + cmd + b"o",
    "newobj": lambda cmd: b"csubprocess\nPopen\n" + cmd + b"\x85\x81",
    "newobj-ex": lambda cmd: b"csubprocess\nPopen\n" + cmd + b"\x85}\x92",
    "popen": lambda cmd: b"csubprocess\nPopen\n" + cmd + b"\x85R",
    "asyncio-popen": lambda cmd: b"casyncio.subprocess\ncreate_subprocess_shell\n" + cmd + b"\x85R",
    "eval": lambda cmd: b"cbuiltins\neval\n" + text("open('x','w')") + b"\x85R",
    "eval-python-2": lambda cmd: b"c__builtin__\neval\n" + text("1") + b"\x85R",
    "exec": lambda cmd: b"cbuiltins\nexec\n" + text("1") + b"\x85R",
    "compile": lambda cmd: b"cbuiltins\ncompile\n)R",
    "open": lambda cmd: b"cbuiltins\nopen\n" + text("x") + b"\x85R",
    "io-open": lambda cmd: b"c_io\nopen\n" + text("x") + b"\x85R",
    "import": lambda cmd: b"cbuiltins\n__import__\n" + text("os") + b"\x85R",
    "importlib": lambda cmd: b"cimportlib\nimport_module\n" + text("os") + b"\x85R",
    "runpy": lambda cmd: b"crunpy\nrun_path\n" + text("x") + b"\x85R",
    "pickle": lambda cmd: b"c_pickle\nloads\n" + text("x") + b"\x85R",
    "ctypes": lambda cmd: b"cctypes\nCDLL\n" + text("x") + b"\x85R",
    "socket": lambda cmd: b"csocket\ncreate_connection\n)R",
    "shutil": lambda cmd: b"cshutil\nrmtree\n)R",
    "sys-modules": lambda cmd: b"csys\nmodules\n",
    "dunder": lambda cmd: b"ccollections\nOrderedDict.__init__.__globals__\n",
    "subclasses": lambda cmd: b"cbuiltins\nobject.__subclasses__\n)R",
    "copyreg-pickle": lambda cmd: b"ccopyreg\npickle\n)R",
    "build": lambda cmd: b"c__main__\nA\n)\x81}" + text("__reduce__") + b"cos\nsystem\nsb",
    "build-class": lambda cmd: b"c__main__\nA\n}" + text("__setstate__") + b"c__main__\nB\nsb",
    "persistent-id": lambda cmd: b"(" + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\x01tQ",
    "persistent-reduce": lambda cmd: b"cos\nsystem\n" + cmd + b"\x85RQ",
    "ext1": lambda cmd: b"\x82\x01" + cmd + b"\x85R",
    "ext2": lambda cmd: b"\x83\x01\x00" + cmd + b"\x85R",
    "ext4": lambda cmd: b"\x84\x01\x00\x00\x00" + cmd + b"\x85R",
    "from-type": lambda cmd: (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n" + cmd + b"\x85}tR"
    ),
    "getattr-os": lambda cmd: b"cbuiltins\ngetattr\ncnumpy\nrandom\n" + text("os") + b"\x86R",
    "getattr-python-2": lambda cmd: b"c__builtin__\ngetattr\nctorch\nload\n" + text("x") + b"\x86R",
    "getattr-dotted": lambda cmd: b"cbuiltins\ngetattr.__call__\n)R",
    "getattr-elsewhere": lambda cmd: b"csomewhere\ngetattr\n)R",
    "getattr-instance": lambda cmd: (
        b"cbuiltins\ngetattr\ncmmengine.logging.history_buffer\nHistoryBuffer\n)R" + text("min") + b"\x86R"
    ),
    "getattr-other-buffer": lambda cmd: b"cbuiltins\ngetattr\ncevil\nHistoryBuffer\n" + text("x") + b"\x86R",
    "getattr-kept": lambda cmd: b"}" + text("x") + b"cbuiltins\ngetattr\ns",
    "getattr-passed": lambda cmd: b"cfunctools\npartial\ncbuiltins\ngetattr\n\x85R",
    "getattr-popped": lambda cmd: b"cbuiltins\ngetattr\n0N",
    "getattr-memo": lambda cmd: (
        b"cbuiltins\ngetattr\nq\x01cmmengine.logging.history_buffer\nHistoryBuffer\n" + text("min") + b"\x86R"
        b"h\x01\x86"
    ),
    "getattr-newobj": lambda cmd: (
        b"cbuiltins\ngetattr\ncmmengine.logging.history_buffer\nHistoryBuffer\n" + text("min") + b"\x86\x81"
    ),
    "getattr-inst": lambda cmd: (
        b"(cmmengine.logging.history_buffer\nHistoryBuffer\n" + text("min") + b"ibuiltins\ngetattr\n"
    ),
    "getattr-three": lambda cmd: (
        b"cbuiltins\ngetattr\ncmmengine.logging.history_buffer\nHistoryBuffer\n" + text("min") + b"N\x87R"
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["state_dict", "beside", "legacy", "bare"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_fault_35_is_refused_and_not_run(tmp_path: Path, canary: Path, attack: str, where: str) -> None:
    payload = ATTACKS[attack](text(f"touch '{canary}'"))
    path = tmp_path / "x.pth"
    if where == "state_dict":
        archive(path, b"\x80\x02}(" + text("a") + tensor() + text("b") + payload + b"u.")
    elif where == "beside":
        archive(
            path, b"\x80\x02}(" + text("state_dict") + b"}" + text("a") + tensor() + b"s" + text("m") + payload + b"u."
        )
    elif where == "legacy":
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
        raw = path.read_bytes()
        at = raw.index(b"}q\x00X\x01\x00\x00\x00a")  # where the object's pickle begins
        path.write_bytes(raw[:at] + payload + b"0" + raw[at:])
    else:
        path.write_bytes(b"\x80\x02" + payload + b".")
    if where in ("legacy", "bare") and attack == "persistent-id":
        assert refusal(path, UnsafeError, "os.system").exit_code == 5
    else:
        error = refusal(path, UnsafeError)
        assert error.exit_code == 5 and error.hint
    assert not canary.exists()


@pytest.mark.parametrize("attack", ["stack-global", "popen", "eval", "getattr-os"])
def test_fault_35_names_the_global(tmp_path: Path, canary: Path, attack: str) -> None:
    names = {"stack-global": "os.system", "popen": "subprocess.Popen", "eval": "builtins.eval", "getattr-os": "getattr"}
    path = archive(tmp_path / "x.pth", b"\x80\x02" + ATTACKS[attack](text(f"touch '{canary}'")) + b".")
    refusal(path, UnsafeError, names[attack])
    assert not canary.exists()


def test_fault_35_the_attacks_are_real(canary: Path) -> None:
    """Python itself runs the same bytes: the canary test would notice a reader that calls."""
    pickle.loads(b"\x80\x02" + ATTACKS["global"](text(f"touch '{canary}'")) + b".")
    assert canary.exists()


@pytest.mark.parametrize(
    "name",
    ["functools partial", "operator attrgetter", "operator methodcaller", "types FunctionType", "numpy ndarray",
     "numpy.random._pickle __bit_generator_ctor", "__main__ Config", "webbrowser open_new", "torch load",
     "builtins map"],
)  # fmt: skip
def test_fault_35_every_other_global_is_inert_and_listed(tmp_path: Path, name: str) -> None:
    module, attribute = name.split(" ")
    call = f"c{module}\n{attribute}\n".encode() + text("touch x") + b"\x85R"
    path = archive(tmp_path / "x.pth", b"\x80\x02}(" + text("a") + tensor() + text("b") + call + b"u.")
    file = read_torch(path)
    assert file.stubs == (f"{module}.{attribute}",)
    assert isinstance(file.root["b"], Inert) and file.root["b"].args == ("touch x",)
    assert list(state_dict(file).tensors) == ["a"]


def test_fault_35_getattr_of_history_buffer_is_accepted(tmp_path: Path) -> None:
    value = b"c__builtin__\ngetattr\ncmmengine.logging.history_buffer\nHistoryBuffer\n" + text("min") + b"\x86R"
    file = read_torch(archive(tmp_path / "x.pth", b"\x80\x02}" + text("b") + value + b"s."))
    assert file.root["b"].name == "mmengine.logging.history_buffer.HistoryBuffer.min"
    assert file.stubs == ("mmengine.logging.history_buffer.HistoryBuffer",)


def test_inert_objects_take_everything_and_do_nothing(tmp_path: Path) -> None:
    made = b"cother\nThing\nK\x01\x85R}" + text("k") + b"K\x02sb(K\x04K\x05e(K\x06K\x07u"
    thing = read_torch(archive(tmp_path / "x.pth", b"\x80\x02" + made + b".")).root
    assert (thing.name, thing.args, thing.state) == ("other.Thing", (1,), {"k": 2})
    assert (thing.items, thing.mapping) == ([4, 5], {6: 7})
    assert repr(thing) == "<Inert other.Thing instance>"


def test_config_dict_is_read_as_a_dict(tmp_path: Path) -> None:
    inner = b"cmmengine.config.config\nConfigDict\n}" + text("type") + text("LLaVAModel") + b"s\x85R"
    file = read_torch(archive(tmp_path / "x.pth", b"\x80\x02}" + text("cfg") + inner + b"s."))
    assert file.root == {"cfg": {"type": "LLaVAModel"}}
    assert file.stubs == ("mmengine.config.config.ConfigDict",)


# -- 36: bounded ---------------------------------------------------------------------------------------------------

_DOUBLE = b"h\x00h\x00\x86q\x000"  # memo 0 = (memo 0, memo 0)

_MANY_TENSORS = (
    b"ctorch._utils\n_rebuild_tensor_v2\nq\x01("
    + STORAGE
    + b"K\0("
    + b"K\1" * 64
    + b"t("
    + b"K\0" * 64
    + b"t\x89}tq\x02"
) + b"R0h\x01h\x02" * 400_000
_HUGE_KEYS = b"".join(b"\x8a\x0a" + ((2**61 - 1) * n).to_bytes(10, "little") + b"N" for n in (1, 2))

BOMBS: dict[str, bytes] = {
    "doubled tuples": b")q\x000" + _DOUBLE * 64 + b"h\x00",
    "doubled lists": b"]q\x000" + b"](h\x00h\x00eq\x000" * 64 + b"h\x00",
    "doubling by list()": b"(" + b"K\x01" * 1000 + b"lq\x00" + b"cbuiltins\nlist\nq\x01" + b"h\x01h\x00\x85R0" * 5000,
    "sets": b"\x8f" * 200_000,
    "sets by call": b"cbuiltins\nset\nq\x00" + b"h\x00)R" * 200_000,
    "tensors": _MANY_TENSORS,
    "operations": b"N0" * 2_100_000 + b"N",
    "nested": b"]" * 100_000 + b"a" * 99_999,
    "nested tuples": b")" + b"\x85" * 100_000,
    "nested tuple as a key": b"})" + b"\x85" * 100_000 + b"Ns",
    "doubled tuple as a key": b"})q\x000" + _DOUBLE * 64 + b"h\x00Ns",
    "holds itself": b"]q\x00h\x00a",
    "huge int": b"\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20),
    "colliding keys": b"}(" + _HUGE_KEYS + b"u",
    "long name": b"c" + b"a" * 300 + b"\n" + b"b" * 300 + b"\n",
    "text": (b"h\x00" + text("y" * 1_000_000) + b"0") * 70,
}  # fmt: skip
BOMBS["text"] = b"Nq\x00" + BOMBS["text"]


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_fault_36_is_bounded(tmp_path: Path, bomb: str) -> None:
    path = archive(tmp_path / "x.pth", b"\x80\x02" + BOMBS[bomb] + b".")
    start = time.process_time()
    assert refusal(path, UnsafeError).exit_code == 5
    assert time.process_time() - start < 20


_PRIME = 2**61 - 1  # hash(n * _PRIME) == 0 for every n
_MIB = "k" * (1 << 20)
_BUFFER = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"

# What a pickle of a few MB can ask for at a cost of minutes, or of a GiB; the words of its refusal.
SLOW: dict[str, tuple[bytes, str]] = {
    "memo collisions": (b"N" + b"".join(b"p%d\n" % (_PRIME * n) for n in range(1, 40_000)), "leaps"),
    "negative memo collisions": (b"N" + b"".join(b"p-%d\n" % (_PRIME * n) for n in range(1, 40_000)), "leaps"),
    "binary memo leaps": (b"N" + b"".join(b"r" + struct.pack("<I", n << 20) for n in range(1, 4000)), "leaps"),
    "long method": (
        b"cbuiltins\ngetattr\nq\x000" + _BUFFER + text(_MIB) + b"\x86q\x010" + b"h\x00h\x01R0" * 100_000, "getattr"
    ),
    "long storage key": (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(_MIB) + text("cpu") + b"K\0tq\x000"
        + b"h\x00Q0" * 200_000, "storage with 1,048,576 characters"
    ),
    "long storage key in bytes": (
        b"(" + text("storage") + b"ctorch\nFloatStorage\nB" + struct.pack("<I", 1 << 20) + _MIB.encode() + text("cpu")
        + b"K\0tq\x000" + b"h\x00Q0" * 200_000, "storage with 1,048,576 characters"
    ),
    "globals": (b"".join(b"ca%x\nb\n0" % n for n in range(10_001)), "more than 10,000 globals"),
    "lists": (b"(" + b"]" * 4_000_000 + b"l", "more than 1,000,000 operations"),
    "equal long keys": (
        b"}" + text(_MIB) + b"Ns" + text(_MIB) + b"q\x010(" + b"h\x01N" * 300_000 + b"u",
        "1,048,576 characters as a key",
    ),
    "long key in a tuple": (b"}" + text(_MIB) + b"\x85Ns", "1,048,576 characters as a key"),
    "long key of a set": (b"\x8f(" + text(_MIB) + b"\x90", "1,048,576 characters as a key"),
    "int keys": (
        b"}(" + b"".join(b"\x8a\x08" + (n << 40).to_bytes(8, "little") + b"N" for n in range(20_001)) + b"u",
        "more than 20,000 numbers as keys",
    ),
    "int keys one by one": (
        b"}" + b"".join(b"J" + struct.pack("<i", n * 4096) + b"Ns" for n in range(20_001)), "20,000 numbers as keys"
    ),
    "float keys": (
        b"\x8f(" + b"".join(b"G" + struct.pack(">d", n * 2.0**40) for n in range(20_001)) + b"\x90",
        "more than 20,000 numbers as keys",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_fault_36_is_refused_early(tmp_path: Path, case: str) -> None:
    pickled, words = SLOW[case]
    path = archive(tmp_path / "x.pth", b"\x80\x02" + pickled + b".")
    start = time.process_time()
    assert refusal(path, UnsafeError, words).exit_code == 5
    assert time.process_time() - start < 10


def test_fault_36_what_real_files_hold_is_below_the_limits() -> None:
    data = pickle.dumps({"state": {n: n for n in range(6000)}, "k" * 4096: 1, 2**31: 2, 0.5: 3}, 2)
    root = machine.load(data, path=Path("x")).root
    assert len(root["state"]) == 6000 and root["k" * 4096] == 1 and root[2**31] == 2 and root[0.5] == 3
    leaps = b"".join(b"p%d\n" % (10_000 * n) for n in range(1, 101))
    assert machine.load(b"N" + leaps + b"g10000\n\x86.", path=Path("x")).root == (None, None)
    in_text_form = pickle.dumps([[n] for n in range(3000)], 0)
    assert machine.load(in_text_form, path=Path("x")).root == [[n] for n in range(3000)]


@pytest.mark.slow
def test_fault_36_containers_take_bounded_memory() -> None:
    """Measured on a tenth of the most operations, since tracemalloc is slow; a list is the most that one can ask."""
    import tracemalloc

    count = MAX_OPCODES // 10
    tracemalloc.start()
    try:
        assert len(machine.load(b"(" + b"]" * count + b"l.", path=Path("x")).root) == count
        assert 10 * tracemalloc.get_traced_memory()[1] < 320 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_fault_36_a_long_name_of_the_archive_is_not_joined_anew(tmp_path: Path) -> None:
    """To join and hash 60,000 characters for each of 200,000 storages took seven times as long as for one character."""
    storage = STORAGE.removesuffix(b"Q") + b"q\x000" + b"h\x00Q0" * 200_000

    def seconds(root: str) -> float:
        path = archive(tmp_path / "x.pth", b"\x80\x02" + storage + b"N.", root=root)
        start = time.process_time()
        assert read_torch(path).root is None
        return time.process_time() - start

    assert seconds("r" * 60_000) < 3 * seconds("r")


def test_fault_36_prefixes_are_taken_off_eight_times(tmp_path: Path) -> None:
    pickled = b"\x80\x02}" + text("module." * 500 + "w") + tensor() + b"s."
    weights = state_dict(read_torch(archive(tmp_path / "x.pth", pickled)))
    assert weights.unwrapped == ("module.",) * 8
    assert list(weights.tensors) == ["module." * 492 + "w"]


LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)


@pytest.mark.parametrize(
    ("version", "found"),
    [(b"K\x07", "unknown version 7"), (text(_MIB) + b"q\x000(" + b"h\x00" * 900 + b"l", "that is no number")],
    ids=["number", "900 MiB of text"],
)
def test_fault_36_legacy_version_is_printed_only_as_a_number(tmp_path: Path, version: bytes, found: str) -> None:
    import tracemalloc

    path = tmp_path / "x.pth"
    path.write_bytes(LEGACY_MAGIC + b"\x80\x02" + version + b".")
    tracemalloc.start()
    try:
        assert refusal(path, InputError, found).exit_code == 3
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_fault_36_legacy_header_is_small(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(LEGACY_MAGIC + pickle.dumps(1001, 2) + b"\x80\x02(" + b"]" * 1000 + b"l.")
    assert refusal(path, UnsafeError, "more than 1,000 operations").exit_code == 5


def test_fault_36_legacy_pickle_longer_than_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window grows to the cap and no further, and the message does not take the window for the pickle."""
    monkeypatch.setattr(machine, "MAX_PICKLE_BYTES", 10 << 20)
    path = tmp_path / "x.pth"
    path.write_bytes(LEGACY_MAGIC + pickle.dumps(1001, 2) + b"\x80\x02}." + b"\x8e" + struct.pack("<Q", 20 << 20))
    os.truncate(path, 30 << 20)
    assert refusal(path, UnsafeError, "do not end within 10,485,760 bytes").exit_code == 5


@pytest.mark.parametrize(
    "asks",
    [b"cbuiltins\nbytes\n\x8a\x06\0\0\0\0\0\x01\x85R", b"cbuiltins\nrange\n\x8a\x06\0\0\0\0\0\x01\x85R",
     b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R", b"Nr\xff\xff\xff\x7f", b"Np99999999999\n"],
    ids=["bytes", "range", "bytearray", "memo index", "memo index as text"],
)  # fmt: skip
def test_fault_36_numbers_allocate_nothing(tmp_path: Path, asks: bytes) -> None:
    import tracemalloc

    path = archive(tmp_path / "x.pth", b"\x80\x02" + asks + b".")
    tracemalloc.start()
    try:
        read_torch(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_fault_36_deep_object_graphs_are_leaves(tmp_path: Path) -> None:
    """Cycles through objects are real (modules know their parents) and harmless, since nothing walks them."""
    cycle = b"cother\nNode\n)Rq\x00}" + text("parent") + b"h\x00sb"
    file = read_torch(archive(tmp_path / "x.pth", b"\x80\x02}(" + text("a") + tensor() + text("n") + cycle + b"u."))
    assert file.root["n"].state["parent"] is file.root["n"]


def test_fault_36_pickle_longer_than_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with (
        path.open("wb") as stream,
        zipfile.ZipFile(stream, "w") as target,
        target.open(zipfile.ZipInfo("x/data.pkl"), "w") as record,
    ):
        stream.seek(machine.MAX_PICKLE_BYTES, os.SEEK_CUR)
        stream.write(b"\0")
        record._file_size = machine.MAX_PICKLE_BYTES + 1  # type: ignore[attr-defined]
    refusal(path, UnsafeError, "data.pkl has")


def test_fault_36_a_scalar_that_claims_to_be_a_petabyte(tmp_path: Path) -> None:
    huge = tensor(size=b"\x8a\x07" + (1 << 48).to_bytes(7, "little") + b"\x85", stride=b"K\x00\x85")
    refusal(archive(tmp_path / "x.pth", b"\x80\x02}" + text("a") + huge + b"s."), UnsafeError, "repeating itself")


# -- damaged pickles -----------------------------------------------------------------------------------------------

DAMAGE: dict[str, bytes] = {
    "empty": b"",
    "no stop": b"\x80\x02}",
    "protocol 9": b"\x80\x09N.",
    "opcode": b"\x80\x02\xff.",
    "underflow": b"\x80\x02\x86.",
    "pop": b"0.",
    "no mark": b"t.",
    "stop": b".",
    "setitem": b"NNNs.",
    "odd items": b"}(Nu.",
    "memo": b"h\x05.",
    "utf-8": b"X\x01\0\0\0\xff.",
    "frame": b"\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
    "binbytes8": b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffN.",
    "binunicode8": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fN.",
    "long4": b"\x8b\x10\0\0\0N.",
    "call of text": text("os") + b")R.",
    "args": b"cother\nA\nNR.",
    "list key": b"}]Ns.",
    "append to None": b"NNa.",
    "build on None": b"N}b.",
    "buffer": b"\x97.",
    "persid": b"P0\n.",
    "pid": b"NQ.",
    "pid length": b"(" + text("storage") + b"tQ.",
    "global without name": b"c\n\n.",
    "stack global": b"NN\x93.",
    "int": b"Ixyz\n.",
    "int digits": b"I" + b"9" * 400 + b"x\n.",
    "float": b"Fx\n.",
    "string": b"Sx\n.",
    "no line": b"cos",
    "rebuild": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "rebuild args": b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.",
    "rebuild v3": b"ctorch._utils\n_rebuild_tensor_v3\n(NNNNNNNtR.",
    "from type": b"ctorch._tensor\n_rebuild_from_type_v2\n)R.",
    "size": b"ctorch\nSize\n(" + text("x") + b"t\x85R.",
    "set of lists": b"cbuiltins\nset\n](]e\x85R.",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_pickle(tmp_path: Path, damage: str) -> None:
    assert refusal(archive(tmp_path / "x.pth", DAMAGE[damage]), InputError).exit_code == 3


def test_every_truncation_and_flip_ends_in_an_own_error(tmp_path: Path) -> None:
    """No input gives a traceback: each prefix of a real pickle, and each of its bytes changed."""
    path = tmp_path / "x.pth"
    value = {
        "a": torch.ones(4),
        "p": torch.nn.Parameter(torch.ones(2)),
        "s": {1},
        "f": torch.ones(3).to(torch.float8_e5m2),
    }
    torch.save(value, path)
    with zipfile.ZipFile(path) as source:
        raw = source.read("x/data.pkl")
    seen = set()
    for at in range(len(raw)):
        flipped, noise = (raw[:at] + bytes([byte]) + raw[at + 1 :] for byte in (raw[at] ^ 0x11, 0xFF))
        for damaged in (raw[:at], flipped, noise):
            try:
                machine.load(damaged, path=path, persistent=lambda pid: pid)
            except ConvertError as error:
                seen.add(type(error))
    assert InputError in seen


def test_every_truncation_of_the_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    path = tmp_path / "x.pth"
    for legacy in (False, True):
        torch.save({"a": torch.ones(4)}, whole, _use_new_zipfile_serialization=not legacy)
        raw = whole.read_bytes()
        for length in range(0, len(raw), 3):
            path.write_bytes(raw[:length])
            with pytest.raises(InputError):
                read_torch(path)


@pytest.mark.slow
def test_every_flipped_byte_of_the_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    path = tmp_path / "x.pth"
    for legacy in (False, True):
        torch.save({"a": torch.ones(4)}, whole, _use_new_zipfile_serialization=not legacy)
        raw = whole.read_bytes()
        for at in range(len(raw)):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
            try:
                file = read_torch(path)
            except ConvertError:
                continue
            if isinstance(file.root, dict):
                for value in file.root.values():
                    if isinstance(value, StoredTensor):
                        assert all(part.offset + part.length <= len(raw) for part in value.extents)


# -- 38: other forms -----------------------------------------------------------------------------------------------


def test_fault_38_tar(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with tarfile.open(path, "w") as target:
        info = tarfile.TarInfo("storages")
        info.size = 4
        target.addfile(info, io.BytesIO(b"abcd"))
    error = refusal(path, UnsupportedError, "TAR")
    assert error.exit_code == 4 and error.hint and "torch.save(torch.load(" in error.hint


def test_fault_38_legacy_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    refusal(path, InputError, "truncated")
    path.write_bytes(raw[:-24] + struct.pack("<q", 5) + raw[-16:])
    refusal(path, InputError, "5 elements")
    path.write_bytes(b"\x80\x02" + b"\x8a\x0a" + (123456).to_bytes(10, "little") + b".")
    refusal(path, InputError, "not a file of torch.save")


def test_fault_38_legacy_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    at = raw.index(b"little_endian") + len(b"little_endian") + 2
    assert raw[at : at + 1] == b"\x88"
    path.write_bytes(raw[:at] + b"\x89" + raw[at + 1 :])
    assert refusal(path, UnsupportedError, "big-endian").exit_code == 4


def test_torchscript_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    refusal(path, UnsupportedError, "TorchScript")


# -- 39, 40: the zip around it -------------------------------------------------------------------------------------

GOOD = b"\x80\x02}" + text("a") + tensor() + b"s."


def test_fault_39_deflated(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", GOOD)
        target.writestr("archive/data/0", os.urandom(16))
    assert refusal(path, InputError, "is compressed").exit_code == 3


def test_fault_39_bomb(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", bytes(50_000_000))
    assert refusal(path, UnsafeError, "would expand").exit_code == 5


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_fault_39_duplicate_names(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", GOOD)
    with zipfile.ZipFile(path, "a") as target:
        target.writestr("archive/data/0", b"other bytes 0123")
    assert refusal(path, UnsafeError, "two records named archive/data/0").exit_code == 5


LEAVING = ["../evil", "archive/../../evil", "/etc/evil", "C:/evil", "a\\..\\evil", "\\\\host\\x"]


@pytest.mark.parametrize("name", LEAVING)
def test_fault_39_names_that_leave(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "x.pth", GOOD)
    with zipfile.ZipFile(path, "a") as target:
        target.writestr(name, b"x")
    assert refusal(path, UnsafeError, "leads out of the archive").exit_code == 5


def test_fault_39_bad_crc(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", GOOD)
    raw = path.read_bytes()
    crc = struct.pack("<I", zlib.crc32(GOOD))
    path.write_bytes(raw.replace(crc, struct.pack("<I", zlib.crc32(GOOD) ^ 1)))
    assert refusal(path, InputError, "CRC").exit_code == 3


def test_fault_39_encrypted(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", GOOD)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    assert refusal(path, InputError, "encrypted").exit_code == 3


def test_fault_39_no_data_pkl(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/weights", b"x")
    assert refusal(path, InputError, "no data.pkl").exit_code == 3


def test_fault_39_two_data_pkl(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", GOOD)
    with zipfile.ZipFile(path, "a") as target:
        target.writestr("other/data.pkl", b"N.")
    refusal(path, InputError, "2 files named data.pkl")


def test_fault_39_overlapping_records(tmp_path: Path) -> None:
    """A record whose bytes hold a whole other record (the quoting bomb)."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as target:
        target.writestr("archive/data/9", b"0123456789abcdef")
    local = inner.getvalue()[: 30 + len("archive/data/9") + 16]
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", GOOD)
        target.writestr("archive/data/0", local)
        outer = target.getinfo("archive/data/0")
        hidden = zipfile.ZipInfo("archive/data/9")
        hidden.header_offset = outer.header_offset + 30 + len("archive/data/0")
        hidden.file_size = hidden.compress_size = 16
        hidden.CRC = zlib.crc32(b"0123456789abcdef")
        target.filelist.append(hidden)
        target.NameToInfo[hidden.filename] = hidden
        target._didModify = True  # type: ignore[attr-defined]
    assert refusal(path, UnsafeError, "overlap").exit_code == 5


def test_fault_39_record_past_the_end(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", GOOD)
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    struct.pack_into("<LL", raw, at + 20, 5000, 5000)
    path.write_bytes(raw)
    refusal(path, InputError, "past the end")


def test_fault_39_local_header_of_another_name(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", GOOD)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"archive/data/0", b"archive/data/1", 1))
    refusal(path, InputError, "not its own")


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_fault_40_unfinished_save(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(1000)}, path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    error = refusal(path, InputError, "unfinished save")
    assert error.exit_code == 3 and error.hint


def test_fault_40_missing_storage(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", GOOD)
    refusal(path, InputError, "storage 0 is missing")


# -- 41, 42: what a tensor says of itself --------------------------------------------------------------------------

VIEWS = {
    "storage too short": tensor(size=b"K\x05\x85"),
    "offset past the end": tensor(offset=1),
    "negative offset": tensor(offset=-1),
    "negative size": tensor(size=b"J\xff\xff\xff\xff\x85"),
    "negative stride": tensor(stride=b"J\xff\xff\xff\xff\x85"),
    "stride past the end": tensor(stride=b"K\x02\x85"),
    "float size": tensor(size=b"G\0\0\0\0\0\0\0\0\x85"),
    "bool size": tensor(size=b"\x88\x85"),
    "lengths differ": tensor(stride=b")"),
    "huge size": tensor(size=b"\x8a\x09" + (1 << 64).to_bytes(9, "little") + b"\x85", stride=b"K\x00\x85"),
    "overflowing": tensor(size=b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85", stride=b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"),
    "65 dimensions": tensor(size=b"(" + b"K\x01" * 65 + b"t", stride=b"(" + b"K\x01" * 65 + b"t"),
    "count above the record": tensor(storage=STORAGE.replace(b"K\x04", b"K\x05")),
    "negative count": tensor(storage=STORAGE.replace(b"K\x04", b"J\xff\xff\xff\xff")),
    "missing key": tensor(storage=STORAGE.replace(b"\x000X", b"\x009X")),
    "no storage": tensor(storage=b"N"),
}


@pytest.mark.parametrize("view", VIEWS)
def test_fault_41_impossible_views(tmp_path: Path, view: str) -> None:
    path = archive(tmp_path / "x.pth", b"\x80\x02}" + text("a") + VIEWS[view] + b"s.")
    assert refusal(path, InputError).exit_code == 3


def test_fault_42_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", GOOD)
        target.writestr("archive/byteorder", "big")
        target.writestr("archive/data/0", bytes(16))
    assert refusal(path, UnsupportedError, "big-endian").exit_code == 4


def test_fault_42_quantised(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    made = tensor(storage=STORAGE.replace(b"FloatStorage", b"QInt8Storage"))
    archive(path, b"\x80\x02}" + text("layer.weight") + made + b"s.")
    assert refusal(path, UnsupportedError, "layer.weight", "QInt8Storage").exit_code == 4


# -- 1, 19, 20, 32: no checkpoint at all ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b'{"error": "Not found"}', "web page"),
        (struct.pack("<Q", 20) + b'{"a":{}}            ', "safetensors"),
        (b"GGUF\x03\0\0\0", "not a file of torch.save"),
        (b"\x00\x01\x02\x03" * 50, "not a file of torch.save"),
        (b"PK", "unfinished save"),
        (b"PK\x05\x06" + bytes(18), "no data.pkl"),
        (pickle.dumps({"a": 1}), "not a file of torch.save"),
    ],
    ids=["empty", "lfs", "html", "json", "safetensors", "gguf", "noise", "pk", "empty zip", "pickle"],
)
def test_faults_1_19_20_not_a_checkpoint(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert refusal(path, InputError, fragment).exit_code == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fault_32_fifo_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    os.mkfifo(path)
    refusal(path, InputError, "is a pipe where a file is expected")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fault_32_fifo_swapped_in_after_the_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between stat and open the file becomes a FIFO without a writer: opened without waiting, and refused."""
    path = archive(tmp_path / "x.pth", GOOD)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    honest = Path.stat

    def stat_then_swap(self: Path, **options: bool) -> os.stat_result:
        found = honest(self, **options)
        if self == path and fifo.exists():
            fifo.replace(path)
        return found

    monkeypatch.setattr(Path, "stat", stat_then_swap)
    with pytest.raises(InputError, match="is a pipe where a file is expected"):
        read_torch(path)


def test_fault_33_nul_in_the_path() -> None:
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_torch(Path("a\0b.pth"))
    assert caught.value.exit_code == 3 and caught.value.message.isprintable()


def test_fault_32_folder_missing_and_forbidden(tmp_path: Path) -> None:
    refusal(tmp_path, InputError, "is a folder")
    refusal(tmp_path / "none.pth", InputError, "no such file")
    if hasattr(os, "geteuid") and os.geteuid():
        path = archive(tmp_path / "x.pth", GOOD)
        path.chmod(0)
        refusal(path, InputError, "cannot be read")


def test_messages_of_hostile_names_are_printable(tmp_path: Path) -> None:
    name = "sy\x1b[2Jstem" * 20
    path = archive(tmp_path / "x.pth", b"\x80\x02" + text("os") + text(name) + b"\x93.")
    refusal(path, UnsafeError, "os.sy\\x1b")
