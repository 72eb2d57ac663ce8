"""Hostile configs: nothing runs, nothing is allocated, and the error says so (exit 5)."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from llava_convert.core.errors import ConvertError, InputError, UnsafeError
from llava_convert.layouts.training_config import load_training_config, parse_training_config
from llava_convert.storage.pyconfig.evaluate import Unknown, evaluate

RUNS_CODE = [
    "__import__('os').system('touch {canary}')",
    "import os\nos.system('touch {canary}')",
    "from os import system as s\nx = s('touch {canary}')",
    "import os as harmless\nx = dict(a=[harmless.popen('touch {canary}')])",
    "exec(\"open('{canary}', 'w')\")",
    "x = eval(\"open('{canary}', 'w')\")",
    "compile(\"open('{canary}', 'w')\", 'x', 'exec')",
    "import subprocess\nsubprocess.run(['touch', '{canary}'])",
    "import importlib\nimportlib.import_module('evil')",
    "f = eval\nx = f('1')",
    "import pickle\nx = pickle.loads(b'')",
    "x = ().__class__.__base__.__subclasses__()",
    "x = ''.__class__",
    "x = 'a'.__reduce__()",
    "x = [c for c in {{}}.__class__.__mro__]",
    "import os\nx = f\"{{os.system('touch {canary}')}}\"",
]

INERT = [
    "x = open('{canary}', 'w').write('x')",
    "import pathlib\npathlib.Path('{canary}').touch()",
    "x = (lambda: open('{canary}', 'w'))()",
    "class A:\n    open('{canary}', 'w')",
    "class M(type):\n    def __new__(*a):\n        open('{canary}', 'w')\nclass B(metaclass=M):\n    pass",
    "@(lambda f: open('{canary}', 'w'))\ndef f():\n    pass\nf()",
    "def f(x=open('{canary}', 'w')):\n    open('{canary}', 'w')\nf()",
    "x = '{{0.__class__}}'.format(1)",
    "x = '{{x.y}}'.format(x=1)",
    "x = getattr(__builtins__, 'open')('{canary}', 'w')",
    "with open('{canary}', 'w') as f:\n    f.write('x')",
    "try:\n    1 / 0\nexcept ZeroDivisionError:\n    open('{canary}', 'w')",
    "assert open('{canary}', 'w')",
    "import torch\nx: open('{canary}', 'w') = 1",
]


@pytest.mark.parametrize("code", RUNS_CODE)
def test_code_that_runs_on_reading_is_refused_and_not_run(code: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(UnsafeError) as caught:
        evaluate(code.format(canary=canary), filename="evil.py")
    assert not canary.exists()
    assert caught.value.exit_code == 5
    assert caught.value.message.startswith("evil.py:")
    assert "--config" in (caught.value.hint or "")


@pytest.mark.parametrize("code", INERT)
def test_other_code_is_left_alone(code: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    assert evaluate("before = 1\n" + code.format(canary=canary) + "\nafter = 2", filename="odd.py")["after"] == 2
    assert not canary.exists()


NESTED = "a = [1]\n" + "a = [a, a]\n" * 60

BOMBS = [
    "x = 9**9**9",
    "x = 9**(9**9)",
    "x = 2**-(-10**9)",
    "x = 1 << 10**10",
    "x = 10**1000 * 10**1000 * 10**1000",
    "x = 'a' * 10**12",
    "x = 10**12 * [0]",
    "x = (0,) * 10**9",
    "x = 'a' * 90_000\n" + "x = x + x\n" * 40,
    "x = [0] * 9_000\n" + "x += x\n" * 40,
    "x = [0] * 9_000\nfor i in range(40):\n    x.extend(x)",
    "x = 'a' * 1000\nx = ''.join([x] * 1000).join([x] * 1000)",
    "x = ('a' * 1000).replace('a', 'b' * 1000)",
    "x = 'a' * 9000\nx = '{}' * 1000\nx = x.format(*[x] * 1000)",
    "x = 'a' * 9000\nx = f'{x}{x}{x}{x}{x}{x}{x}{x}{x}{x}{x}{x}'",
    "x = range(10**9)",
    "x = list(range(10**12))",
    "x = [0 for a in range(9999) for b in range(9999) for c in range(9999)]",
    "x = {(a, b) for a in range(9999) for b in range(9999)}",
    "x = {a: b for a in range(9999) for b in range(9999)}",
    "x = [1 for a in range(9999) for b in range(9999) if False]",
    "for a in range(9999):\n    for b in range(9999):\n        pass",
    "big = [0] * 9999\n" + "x = [" + "big + [1]," * 9999 + "]",
    "import copy\nbig = [[0] for i in range(9999)]\n" + "x = copy.deepcopy(big)\n" * 99,
    "s = 'a' * 90_000\n" + "x = s.count('b')\n" * 1000,
    "_base_ = 'self0.py'",
    "x = " + "-" * 5000 + "1",
    "x = 1" + " + 1" * 5000,
    "x = a" + ".b" * 5000,
    "x = a" + "[0]" * 5000,
    "x = a" + "()" * 5000,
    "x = 1" + " + 1" * 200_000,
    "x = " + "[" * 150 + "]" * 150,
    "if 0:\n    x = 1\n" + "".join(f"elif not {i + 1}:\n    x = 1\n" for i in range(2000)),
    "x = 1\n" * 60_000,
    "x = '" + "a" * 1_000_001 + "'",
]


def _many(name: str) -> str | None:
    """An endless chain of base configs."""
    return f"_base_ = 'self{int(name[4:-3]) + 1}.py'" if name.startswith("self") else None


@pytest.mark.slow
@pytest.mark.parametrize("code", BOMBS, ids=lambda code: code[:40].replace("\n", ";"))
def test_bombs_are_refused_quickly_and_in_little_memory(code: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(UnsafeError):
            evaluate(code, filename="bomb.py", load=_many)
        assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 60  # seconds of CPU: this guards against hanging, and measures nothing


@pytest.mark.parametrize(
    "expression",
    [
        "f'{1:1000000000}'",
        "f'{1.0:.999999999f}'",
        "'{:>999999999}'.format(1)",
        "'{:{}}'.format(1, 10**9)",
        "'%1000000000d' % 5",
        "round(1, -10**9)",
        "'x'.center(10**9)",
        "'x'.ljust(10**9)",
        "'x'.zfill(10**9)",
        "'\\t'.expandtabs(10**9)",
        "bytes(10**10)",
        "bytearray(10**10)",
        "b'a' * 10**10",
        "int('9' * 5000)",
        "0x" + "f" * 100_000,
        "pow(9, 999999)",
        "sum(x for x in iter(int, 1))",
        "'{0.__class__}'.format(1)",
    ],
)
def test_huge_requests_through_library_calls_are_not_met(expression: str) -> None:
    tracemalloc.start()
    try:
        got = evaluate(f"x = {expression}", filename="odd.py")["x"]
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert not isinstance(got, int | str | bytes)


@pytest.mark.parametrize("use", ["a == b", "a != b", "a in b", "str(a)", "f'{a}'", "{a: 1}", "'{}'.format(a)", "a < b"])
def test_shared_lists_are_not_walked(use: str) -> None:
    """A chain of 60 lists, each holding the one before twice, has 2**60 leaves."""
    text = NESTED + NESTED.replace("a", "b") + f"x = {use}"
    assert isinstance(evaluate(text, filename="odd.py")["x"], Unknown)


def test_a_dict_merged_with_its_like_is_bounded() -> None:
    nest = "m = dict(x=1)\n" + "m = dict(x=m, y=m)\n" * 60
    with pytest.raises(UnsafeError):
        evaluate("_base_ = 'a.py'\n" + nest, filename="my.py", load={"a.py": nest}.get)


MODEL = "model = dict(type='xtuner.model.LLaVAModel', llm=dict(pretrained_model_name_or_path='l'))\n"


def test_self_containing_values_end() -> None:
    text = MODEL + "d = []\nd.append(d)\nd.append(dict(datasets=d))\ntrain_dataloader = dict(dataset=d)\n"
    assert parse_training_config(text, "my.py").llm == "l"


def test_base_outside_reach_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "my.py"
    for base in ("/etc/hosts", "../secret.txt", "/absolute/x.py"):
        config.write_text(f"_base_ = {base!r}\n" + MODEL)
        with pytest.raises(UnsafeError, match=r"relative path to a \.py file"):
            load_training_config(config)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(InputError, match="not a file"):
        load_training_config(tmp_path / "pipe.py")
    (tmp_path / "my.py").write_text("_base_ = 'pipe.py'\n" + MODEL)
    with pytest.raises(InputError, match="not a file"):
        load_training_config(tmp_path / "my.py")


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        (None, InputError, "No such file"),
        (b"", InputError, "no `model`"),
        (b"a = '\xff\xfe'", InputError, "not UTF-8 text"),
        (b"\xef\xbb\xbf" + MODEL.encode(), None, ""),
        (b"x = 1\n" * 1_000_000, UnsafeError, "too large"),
        (b"model = dict(", InputError, "my.py:1: not valid Python"),
        (b"_base_ = 'a\\0.py'\n" + MODEL.encode(), InputError, "not found"),
        (b"_base_ = '" + b"a" * 5000 + b".py'\n" + MODEL.encode(), InputError, "not found"),
    ],
)
def test_files(content: bytes | None, error: type[ConvertError] | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    if content is not None:
        path.write_bytes(content)
    if error is None:
        assert load_training_config(path).llm == "l"
        return
    with pytest.raises(error) as caught:
        load_training_config(path)
    assert told in caught.value.message
