"""xtuner_config.evaluate: what plain, idiomatic and half-known configs evaluate to."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest

from llava_convert.core.errors import InputError
from llava_convert.storage.pyconfig.evaluate import Call, Dotted, Unknown, evaluate


def read(text: str, files: dict[str, str] | None = None, filename: str = "configs/my.py") -> dict[str, Any]:
    return evaluate(text, filename=filename, load=None if files is None else files.get)


def value(expression: str) -> Any:
    return read(f"import os, math, copy, torch\nimport os.path as osp\nx = {expression}")["x"]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("int(2048 - (336 / 14)**2)", 1472),
        ("[-1, +2.5, not 0, ~1, 7 // 2, 7 % 4, 1 << 4, 2 ** -1]", [-1, 2.5, True, -2, 3, 3, 16, 0.5]),
        ("'./data/' + 'llava' + '/x.json'", "./data/llava/x.json"),
        ("[1] + [2, *range(3)] * 2", [1, 2, 0, 1, 2, 2, 0, 1, 2]),
        ("(0.9, *[0.95], 0.999)", (0.9, 0.95, 0.999)),
        ("{'a': 1, **dict(b=2), **dict({'c-d': 3}, e=4)}", {"a": 1, "b": 2, "c-d": 3, "e": 4}),
        ("dict([('a', 1), ['b', 2]])", {"a": 1, "b": 2}),
        ("{1, 2} == {2, 1}", True),
        ("f'{3:03d}_{0.5:.2f}_{\"a\"!r:>5}_{1e5}'", "003_0.50_  'a'_100000.0"),
        ("'{}_{name}_{:>4}'.format('a', 7, name='n')", "a_n_   7"),
        ("osp.join('a', 'b', os.path.basename('c/d.json'))", "a/b/d.json"),
        ("'-'.join(['A', 'b']).lower().replace('a', 'z')", "z-b"),
        ("max(1, 3), min([2, 5]), round(2.567, 1), len([1, 2]), abs(-3), sum([1, 2])", (3, 2, 2.6, 2, 3, 3)),
        ("float('1e-4'), int('12'), str(3), bool([]), list((1,)), tuple([2])", (1e-4, 12, "3", False, [1], (2,))),
        ("'a' if 2 > 1 >= 1 and not None else 'b'", "a"),
        ("None or 'default'", "default"),
        ("'lora' in 'qlora' and 3 not in [1, 2]", True),
        ("[i * j for i in range(3) if i for j in (1, 10)]", [1, 10, 2, 20]),
        ("{k: v + 1 for k, v in dict(a=1).items()}", {"a": 2}),
        ("[1, 2, 3, 4][1:-1]", [2, 3]),
        ("dict(a=dict(b=[5])).get('a')['b'][0]", 5),
        ("(y := 4) + y", 8),
        ("math.ceil(2.1)", 3),
        ("sorted({'v_proj', 'q_proj'})", ["q_proj", "v_proj"]),
        ("torch.float16", Dotted("torch.float16")),
        ("torch['float16']", Dotted("torch.float16")),
    ],
)
def test_expressions(expression: str, expected: object) -> None:
    got = value(expression)
    assert got == expected
    assert type(got) is type(expected)


def test_imports_are_names_and_no_values_of_the_config() -> None:
    got = read(
        "import torch\nimport torch.nn as nn\nfrom transformers import AutoModel as AM, AutoTokenizer\n"
        "a = AM.from_pretrained\nb = dict(type=nn.Linear, dtype=torch.bfloat16)\nAutoTokenizer = 1"
    )
    assert got == {
        "a": Dotted("transformers.AutoModel.from_pretrained"),
        "b": {"type": Dotted("torch.nn.Linear"), "dtype": Dotted("torch.bfloat16")},
        "AutoTokenizer": 1,
    }


def test_assignments() -> None:
    got = read(
        "a = b = 1\n(c, *d), e = [2, 3, 4], 5\nf: int = 6\ng: int\na += 10\nh = [1]\ni = h\ni += [2]\ndel c\n"
        "m = dict(x=dict(y=1), z=[0, 0], gone=1)\nm['x']['y'] = 2\nm.x.w = 3\nm['z'][-1] = 4\ndel m['gone']\n"
        "m.update(k=5)\nm['x'].update({'v': 6})\nm.setdefault('k', 0)\nm['z'].append(7)\nm['z'].extend((8,))\n"
        "p = m.pop('k')\nm.x.y *= 3"
    )
    assert got == {
        "a": 11, "b": 1, "d": [3, 4], "e": 5, "f": 6, "h": [1, 2], "i": [1, 2], "p": 5,
        "m": {"x": {"y": 6, "w": 3, "v": 6}, "z": [0, 4, 7, 8]},
    }  # fmt: skip


def test_shared_dicts_stay_shared_and_deepcopy_parts_them() -> None:
    got = read("import copy\na = dict(x=1)\nb = a\nc = copy.deepcopy(a)\nd = dict(a)\na['x'] = 2")
    assert got == {"a": {"x": 2}, "b": {"x": 2}, "c": {"x": 1}, "d": {"x": 1}}


def test_conditions_and_loops() -> None:
    got = read(
        "n = 3\nif n > 2:\n    a = 'big'\nelif n:\n    a = 'small'\nelse:\n    a = 0\n"
        "hooks = []\nfor i, name in [(1, 'x'), (2, 'y')]:\n    hooks.append(dict(i=i, name=name))\nelse:\n    b = 1"
    )
    assert got["a"] == "big"
    assert got["hooks"] == [{"i": 1, "name": "x"}, {"i": 2, "name": "y"}]
    assert got["b"] == 1


def test_comprehension_names_end_with_it() -> None:
    got = read("i = 'outer'\nx = [i for i in range(2)]\ny = [i for i in 5]\nz = i")
    assert (got["x"], got["z"]) == ([0, 1], "outer")
    assert isinstance(got["y"], Unknown)


def test_calls_are_kept_and_not_made() -> None:
    got = read(
        "from modelscope import snapshot_download as sd\nimport os\n"
        "a = sd(model_id='X', revision='v1')\nb = os.getenv('HOME', '.')\nc = os.path.join(b, 'x')\nd = mystery(1)"
    )
    assert got["a"] == Call("modelscope.snapshot_download", (), {"model_id": "X", "revision": "v1"}, "configs/my.py:3")
    assert got["b"] == Call("os.getenv", ("HOME", "."), {}, "configs/my.py:4")
    assert got["c"] == Unknown("a value that depends on os.getenv", "configs/my.py:5")
    assert got["d"] == Call("mystery", (1,), {}, "configs/my.py:6")


@pytest.mark.parametrize(
    "expression", ["nowhere", "nowhere.x", "1 / 0", "[][3]", "'a' + 1", "'a' + torch", "lambda: 1", "{[]: 1}", "-'a'"]
)
def test_what_cannot_be_known_says_where(expression: str) -> None:
    got = read(f"import torch\n\nx = {expression}\ny = 1")
    assert isinstance(got["x"], Unknown)
    assert got["x"].where == "configs/my.py:3"
    assert got["y"] == 1


def test_an_unknown_keeps_its_origin_and_stays_where_it_is() -> None:
    got = read("a = nowhere\n\nb = a + 'x'\nm = dict(path=b, depth=2)")
    assert got["m"] == {"path": Unknown("nowhere, which the config does not define", "configs/my.py:1"), "depth": 2}


@pytest.mark.parametrize(
    "code",
    [
        "if nowhere:\n    m['x'] = 2",
        "if nowhere:\n    m = dict(x=2)",
        "if nowhere:\n    m.update(x=2)",
        "for i in nowhere:\n    m.x = i",
        "for i in [1, 2]:\n    m.x = i\n    break",
        "try:\n    m['x'] = 2\nexcept KeyError:\n    pass",
        "while nowhere:\n    m['x'] += 1",
        "with open('x') as f:\n    m['x'] = f",
        "def change():\n    m['x'] = 2\nchange()",
        "import somewhere\nsomewhere.patch(m)",
        "patch(m['y'])",
        "m.update(nowhere)",
        "m.clear()",
        "m[nowhere] = 1",
        "m.y.z = 1",
        "del m[nowhere]",
        "a, m = nowhere",
    ],
)
def test_what_unseen_code_may_have_changed_is_not_stale(code: str) -> None:
    assert isinstance(read(f"m = dict(x=1, y=[])\n{code}")["m"], Unknown)


@pytest.mark.parametrize("code", ["print(m)", "def unused():\n    m['x'] = 2", "import sys\nsys.path.insert(0, '.')"])
def test_harmless_code_changes_nothing(code: str) -> None:
    assert read(f"m = dict(x=1)\n{code}")["m"] == {"x": 1}


def test_base_files_merge_by_dict() -> None:
    files = {
        "base/model.py": "import torch\n_base_ = './deep.py'\nmodel = dict(llm=dict(path='a', n=1), lora=dict(r=8))",
        "base/deep.py": "model = dict(depth=3)\nlr = 1",
        "../run.py": "epochs = 2",
    }
    text = (
        "_base_ = ['base/model.py', '../run.py']\n"
        "model = dict(llm=dict(path='b'), lora=dict(_delete_=True, alpha=16))\n"
        "lr2 = _base_.lr * 10\nlr3 = {{_base_.lr}}"
    )
    assert read(text, files) == {
        "model": {"depth": 3, "llm": {"path": "b", "n": 1}, "lora": {"alpha": 16}},
        "lr": 1, "epochs": 2, "lr2": 10, "lr3": 1,
    }  # fmt: skip


def test_read_base_imports_names() -> None:
    files = {
        "base.py": "from peft import LoraConfig\nmodel = dict(llm='a')\nlora = dict(type=LoraConfig)",
        "../common/run.py": "epochs = 2\nlr = 1\nother = 3",
    }
    text = (
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
        "    from ..common.run import epochs, lr as rate\nmodel.llm = 'b'\n"
        "model.update(lora=dict(type=LoraConfig, r=4))"
    )
    lora = Dotted("peft.LoraConfig")
    assert read(text, files) == {
        "model": {"llm": "b", "lora": {"type": lora, "r": 4}}, "lora": {"type": lora}, "epochs": 2, "rate": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "files", "told"),
    [
        ("_base_ = './gone.py'", {}, "configs/my.py:1: base config gone.py not found"),
        ("_base_ = 'gone.py'", None, "gone.py not found"),
        ("\nwith read_base():\n    from .gone import *", {}, "configs/my.py:3: base config gone.py not found"),
        ("with read_base():\n    from .a import b", {"a.py": ""}, "a.py defines no b"),
        ("with read_base():\n    import a", {"a.py": ""}, "only `from ... import ...`"),
        ("_base_ = 'my.py'", {"my.py": ""}, "inherits from itself through my.py"),
        ("_base_ = 'a.py'", {"a.py": "_base_ = 'b.py'", "b.py": "_base_ = './x/../a.py'"}, "itself through a.py"),
        ("_base_ = 5", {}, "_base_ is not a path"),
        ("_base_ = ['a.py', nowhere]", {"a.py": ""}, "_base_ is not a path"),
        ("_base_ = 'a.py'\nx = dict(a=1)", {"a.py": "x = 1"}, "x is a dict here but not in its base"),
        ("_base_ = 'a.py'", {"a.py": "x ="}, "a.py:1: not valid Python"),
        ("a = 1\nb = = 2", {}, "configs/my.py:2: not valid Python"),
        ("a = 1\0", {}, "configs/my.py"),
        ("a = '\ud800'", {}, "configs/my.py"),
    ],
)
def test_broken_configs(text: str, files: dict[str, str] | None, told: str) -> None:
    with pytest.raises(InputError) as caught:
        read(text, files)
    assert told in caught.value.message


def test_long_sums_and_large_lists_are_read() -> None:
    assert read("x = " + " + ".join(["'ab'"] * 100))["x"] == "ab" * 100
    assert read(f"x = {[{'path': f'{i}.json'} for i in range(3000)]!r}")["x"][2999] == {"path": "2999.json"}


def test_an_invalid_escape_warns_nobody(recwarn: pytest.WarningsRecorder) -> None:
    assert read(r"x = '\d'")["x"] == r"\d"
    assert not recwarn.list


def test_the_result_does_not_depend_on_how_the_file_is_named() -> None:
    files = {"a.py": "x = 1"}
    for name in ("my.py", "configs/my.py", "C:\\configs\\my.py", str(PurePosixPath("/a/b/my.py"))):
        assert read("_base_ = 'a.py'", files, name) == {"x": 1}
