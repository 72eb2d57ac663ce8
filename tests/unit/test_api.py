"""The Python API: the same verbs, the same options, typed results."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llava_convert
from llava_convert.app.jobs.ask import ChatJob, MMBenchJob
from llava_convert.app.jobs.convert import ConvertJob, SweepJob
from llava_convert.app.jobs.look import DoctorJob, InspectJob, VerifyJob
from llava_convert.app.jobs.publish import ReleaseJob, UploadJob
from llava_convert.cli._commands import COMMANDS
from llava_convert.core.errors import ConvertError, InputError, OutputError, UnsupportedError, UsageError
from llava_convert.core.flags import in_keywords, options_of

FUNCTIONS = {
    "convert": (llava_convert.convert, "convert"),
    "merge": (llava_convert.merge, "merge"),
    "plan": (llava_convert.plan, "convert"),
    "inspect": (llava_convert.inspect, "inspect"),
    "verify": (llava_convert.verify, "verify"),
    "chat": (llava_convert.chat, "chat"),
    "doctor": (llava_convert.doctor, "doctor"),
    "mmbench": (llava_convert.mmbench, "eval mmbench"),
    "upload": (llava_convert.upload, "upload"),
    "release": (llava_convert.release, "release"),
    "sweep": (llava_convert.sweep, "sweep"),
}
# What a command says by its name, or by its exit code; and what only Python can give.
ONLY_PYTHON = {"source_layout", "progress", "check"}


def test_names() -> None:
    errors = [name for name in llava_convert.__all__ if name.endswith("Error")]
    kinds = ["Convert", "Hub", "Input", "Mismatch", "Output", "Unsafe", "Unsupported", "Usage"]
    assert errors == [f"{kind}Error" for kind in kinds]
    results = {
        "Diagnosis", "Inspection", "MMBenchResult", "PartFound", "Published", "ReleaseItem", "Reply", "Report",
        "Reporter", "SweepItem", "Verdict",
    }  # fmt: skip
    assert set(llava_convert.__all__) == {*errors, *results, *FUNCTIONS}
    assert dir(llava_convert) == sorted([*llava_convert.__all__, "__version__"])
    assert all(issubclass(getattr(llava_convert, name), ConvertError) for name in errors)
    for name in llava_convert.__all__:
        assert getattr(llava_convert, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'publish'"):
        _ = llava_convert.publish


def options(command: str) -> dict[str, Any]:
    first, *second = command.split()
    found = COMMANDS[first].whole(first)
    for word in second:
        found = found.commands[word]
    return {p.name: p for p in found.params if p.name not in ("as_json", "quiet", "verbose", "help")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_the_options_of_its_command(name: str) -> None:
    """By name, default and help, and as keywords except for what the command takes without a flag."""
    function, command = FUNCTIONS[name]
    keywords, asked = inspect.signature(function).parameters, options(command)
    if name == "plan":
        asked.pop("dry_run")
    assert set(keywords) - ONLY_PYTHON == set(asked)
    told = inspect.getdoc(function)
    for option in asked.values():
        keyword = keywords[option.name]
        if option.param_type_name == "argument" and option.nargs == 1:
            assert keyword.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, option.name
        required = keyword.default is inspect.Parameter.empty
        assert required == option.required
        if not required:
            assert (keyword.default or None) == (option.default or None), option.name
        assert f"{option.name}: {option.help[:12]}" in told, option.name


def test_type_checkers_see_the_keywords(tmp_path: Path) -> None:
    """As they see them of a function that is written out: a wrong name or type is an error, the result has a type."""
    right = "import llava_convert\nreport = llava_convert.convert('x', to='hf', out='y', dtype=None, threads=2)\n"
    (tmp_path / "right.py").write_text(right + "print(report.bytes_written + 1)\n")
    (tmp_path / "wrong.py").write_text(
        "import llava_convert\n"
        "llava_convert.convert('x')\n"
        "llava_convert.convert('x', to='hf', dtyp='fp16')\n"
        "llava_convert.plan('x', to='hf', threads='2')\n"
        "llava_convert.verify('x', 'y').sam\n"
    )
    args = ["--strict", "--follow-imports=silent", "--no-error-summary", str(tmp_path / "right.py")]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *args, str(tmp_path / "wrong.py")], capture_output=True, text=True, timeout=300
    )
    lines = [
        line.partition("wrong.py:")[2].partition(":")[0] for line in checked.stdout.splitlines() if "error" in line
    ]
    assert lines == ["2", "3", "4", "5"], checked.stdout


def test_a_wrong_keyword_is_named() -> None:
    with pytest.raises(TypeError, match=r"convert\(\) got an unexpected keyword argument 'dtyp'"):
        llava_convert.convert("x", to="hf", dtyp="fp16")
    with pytest.raises(TypeError, match=r"verify\(\) missing a required argument: 'out'"):
        llava_convert.verify("x")


def test_convert_and_verify(tiny: Path, tmp_path: Path) -> None:
    report = llava_convert.convert(str(tiny / "iter_2.pth"), to="official", out=str(tmp_path / "o"))
    assert (report.done, report.layouts, report.out) == (True, ("pth", "official"), tmp_path / "o")
    value = json.loads(json.dumps(report.as_json()))
    assert (value["tensors"], value["ops"]) == (80, {"cast": 80, "merge_lora": 18})
    assert value["bytes"] == sum(p.stat().st_size for p in (tmp_path / "o").iterdir())
    weights = {"name": "model.safetensors", "bytes": report.files["model.safetensors"], "tensors": 80}
    assert weights in value["files"]
    verdict = llava_convert.verify(tiny / "iter_2.pth", tmp_path / "o")
    assert verdict.same and verdict.equal == 80
    assert verdict.as_json()["different"] == {}


def test_dry_run_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    planned = llava_convert.plan(tiny / "iter_2.pth", to="hf", out=tmp_path / "o")
    assert not planned.done and list(tmp_path.iterdir()) == []
    assert llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o", dry_run=True) == planned
    real = llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o")
    assert real.plan.hash == planned.plan.hash
    assert planned.files == {p.name: p.stat().st_size for p in (tmp_path / "o").iterdir()}
    assert real.as_json() | {"done": False, "disk_free": planned.disk_free} == planned.as_json()


def test_default_out_is_the_stem_and_the_layout(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert llava_convert.convert(tiny / "iter_2.pth", to="xtuner").out == Path("iter_2_xtuner")
    assert (tmp_path / "iter_2_xtuner" / "projector" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"to": "ggml"}, UsageError, 2),
        ({"to": "hf", "part": "x"}, UsageError, 2),
        ({"to": "hf", "max_shard_size": "x"}, UsageError, 2),
        ({"to": "hf", "pretrained_pth": "absent.pth"}, InputError, 3),
        ({"to": "hf", "llm": "/absent", "part": "visual-encoder", "visual_encoder": "/absent"}, InputError, 3),
    ],
)
def test_errors_are_typed(
    tiny: Path, tmp_path: Path, options: dict[str, Any], error: type[ConvertError], code: int
) -> None:
    with pytest.raises(error) as caught:
        llava_convert.convert(tiny / "iter_2.pth", out=tmp_path / "o", **options)
    assert caught.value.exit_code == code and caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_there(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").write_text("keep")
    with pytest.raises(OutputError) as caught:
        llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "o")
    assert caught.value.exit_code == 6 and "force=True" in f"{caught.value.hint}"
    assert (tmp_path / "o" / "mine").read_text() == "keep"
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "o", force=True)
    assert not (tmp_path / "o" / "mine").exists() and (tmp_path / "o" / "config.json").is_file()


def test_the_same_layout_needs_a_wish(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "a")
    with pytest.raises(UnsupportedError, match="is already official layout"):
        llava_convert.convert(tmp_path / "a", to="official", out=tmp_path / "b")
    llava_convert.convert(tmp_path / "a", to="official", out=tmp_path / "b", max_shard_size="50KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3


@pytest.mark.parametrize(
    "options",
    [{"dtype": "auto"}, {"dtype": "int8"}, {"verify": "ful"}, {"threads": -1}],
    ids=lambda o: "-".join(map(str, *o.items())),
)
def test_values_of_the_command_line_and_others(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """`auto` is a value like on the command line; what the command line refuses is a UsageError here."""
    if options.get("dtype") == "auto":
        assert llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o", **options).dtype == "float16"
        return
    with pytest.raises(UsageError):
        llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o", **options)


# --- messages in keywords


def every_flag() -> list[tuple[str, str, bool]]:
    """Each flag of a command that is a function too, with its keyword, and whether it is a switch."""
    found = {
        (flag, param.name, param.is_flag)
        for _, command in FUNCTIONS.values()
        for param in options(command).values()
        if param.param_type_name == "option"
        for flag in param.opts
    }
    return sorted(found)


@pytest.mark.parametrize(("flag", "keyword", "switch"), every_flag())
def test_each_flag_in_a_message_is_its_keyword(flag: str, keyword: str, switch: bool) -> None:
    jobs = (ChatJob, ConvertJob, DoctorJob, InspectJob, MMBenchJob, ReleaseJob, SweepJob, UploadJob, VerifyJob)
    words = in_keywords(o for job in jobs for o in options_of(job).values())
    said = f"{keyword}=True" if switch else keyword
    assert words(f"give it by {flag}, or leave it out") == f"give it by {said}, or leave it out"
    assert words(f"({flag} gives it)") == f"({said} gives it)"
    assert words(f"`llava-convert upload x {flag}` goes on") == f"`llava-convert upload x {flag}` goes on"
    assert words(f"x{flag} and {flag}-x") == f"x{flag} and {flag}-x"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("--dtype int8: the choices are auto", "dtype='int8': the choices are auto"),
        ("use --dtype bfloat16, which has the range", "use dtype='bfloat16', which has the range"),
        ("--verify off publishes it as it is", "verify='off' publishes it as it is"),
        ("--push REPO publishes", "push=REPO publishes"),
        ("write it with --config CFG.py", "write it with config=CFG.py"),
        ("--part visual-encoder writes the mmproj alone", "part='visual-encoder' writes the mmproj alone"),
        ("replace it with --force, or name a place with -o", "replace it with force=True, or name a place with out"),
        ("which `--part all` then means", "which `part='all'` then means"),
        ("the same command with --resume goes on", "the same command with resume=True goes on"),
        ("--llm PATH|ID", "llm=PATH|ID"),
    ],
)  # fmt: skip
def test_values_in_messages(message: str, said: str) -> None:
    assert in_keywords(options_of(ConvertJob).values())(message) == said


def test_errors_notes_and_results_speak_of_keywords(tiny: Path, tmp_path: Path) -> None:
    flag = re.compile(r"(?<![\w-])--?[a-z]")
    with pytest.raises(UsageError) as caught:
        llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o", hub="both")
    assert str(caught.value) == "hub, private=True, revision and create_pr=True say how to publish"
    assert caught.value.hint == "push=REPO publishes"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", part="projector", out=tmp_path / "p")
    found = llava_convert.inspect(tmp_path / "p")
    assert "base model not named: llm" in f"{found.parts}" and not flag.search(f"{found.targets} {found.notes}")


# --- progress


def test_progress_calls_a_function(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = llava_convert.convert(
        tiny / "iter_2.pth",
        to="official",
        out=tmp_path / "o",
        verify="full",
        progress=lambda done, total: seen.append((done, total)),
    )
    starts = [i for i, (done, _) in enumerate(seen) if done == 0]
    assert len(starts) == 2  # converting, verifying
    total = sum(tensor.nbytes for tensor in report.plan.tensors)
    assert {whole for _, whole in seen} == {total}
    assert seen[starts[1] - 1] == seen[-1] == (total, total)
    done = [done for done, _ in seen[: starts[1]]]
    assert done == sorted(done)


def test_progress_true_prints_notes_and_leaves_no_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "o", progress=True)
    assert capsys.readouterr().err.splitlines() == [*report.notes, *(f"warning: {w}" for w in report.warnings)]


def test_a_reporter_hears_notes_and_stages(tiny: Path, tmp_path: Path) -> None:
    class Heard:
        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, text: str) -> None:
            self.said.append(text)

        def warn(self, text: str) -> None:
            self.said.append(text)

        def start(self, what: str, total: int) -> Callable[[int], None]:
            self.said.append(f"{what} {total}")
            return lambda step: None

    heard = Heard()
    assert isinstance(heard, llava_convert.Reporter)
    report = llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "o", progress=heard)
    assert heard.said == [
        *report.notes,
        *report.warnings,
        f"converting {sum(tensor.nbytes for tensor in report.plan.tensors)}",
    ]
