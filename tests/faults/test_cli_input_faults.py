"""Bad sources through the command line: rows 21 to 23, 30, 33 to 35, 39, 72 and 79 of the fault list."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_convert.app import convert as conversion
from llava_convert.engine import execute
from llava_convert.storage.ranges import FilePool
from tests.faults.corpus import (
    EMBED,
    Q_PROJ,
    TINY,
    Corpus,
    State,
    accepted,
    assert_clean,
    bases,
    edit_json,
    edit_tensors,
    refused,
    run,
    shell,
    tiny,
    trained,
    tree,
    write_pth,
)

pytestmark = pytest.mark.slow

VIT = ("--visual-encoder", TINY / "vit")
NORM = "llm.model.norm.weight"


def changed_pth(folder: Path, name: str, values: dict[int, float]) -> Path:
    """The committed checkpoint with some values of one tensor replaced."""
    state, cfg = trained()
    state[name] = state[name].clone()
    for at, value in values.items():
        state[name].view(-1)[at] = value
    return write_pth(tiny(folder), state, cfg)


# -- 21: values


@pytest.mark.parametrize("target", ["xtuner", "official", "hf"])
def test_fault_21_nan_and_infinity_are_kept_and_counted(tmp_path: Path, target: str) -> None:
    source = changed_pth(tmp_path, NORM, {0: float("nan"), 3: float("inf"), 5: float("-inf")})
    ran = accepted("pth", source, "--to", target, "-o", tmp_path / "out", "--json")
    warned = [w for w in ran.report["warnings"] if "NaN or infinite" in w]
    assert len(warned) == 1 and warned[0].startswith("3 ") and "in 1 tensors" in warned[0] and "norm" in warned[0]
    assert warned[0] in ran.stderr
    name = "language_model.model.norm.weight" if target == "hf" else "model.norm.weight"
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert found[0].isnan() and found[3] == torch.inf and found[5] == -torch.inf and found.isfinite().sum() == 61


def test_fault_21_copied_bytes_are_looked_at_by_a_full_verification(corpus: Corpus, tmp_path: Path) -> None:
    source = corpus.copy("official", tmp_path)

    def change(state: State) -> None:
        state[Q_PROJ].view(-1)[:4] = torch.nan

    edit_tensors(source / "model.safetensors", change)
    ran = accepted("official", source, "--to", "hf", "-o", tmp_path / "out", "--verify", "full", "--json", *VIT)
    assert [w for w in ran.report["warnings"] if w.startswith("4 NaN or infinite values in 1 tensors")]
    copied = load_file(tmp_path / "out" / "model.safetensors")[f"language_model.{Q_PROJ}"]
    original = load_file(source / "model.safetensors")[Q_PROJ]
    assert torch.equal(copied.view(torch.int16), original.view(torch.int16))


@pytest.mark.parametrize("target", ["xtuner", "official", "hf"])
def test_fault_21_a_cast_that_overflows_is_refused(tmp_path: Path, target: str) -> None:
    source = changed_pth(tmp_path, NORM, {0: 70_000.0, 1: -1e9, 2: 65_504.0, 3: float("inf")})
    args: tuple[str | Path, ...] = ("pth", source, "--to", target, "-o", tmp_path / "out")
    ran = refused(tmp_path, 7, "model.norm.weight: 2 finite values", args=args, mend="--dtype bfloat16")
    mend = next(line for line in ran.stderr.splitlines() if line.startswith("  → ")).split("use ")[1].split(",")[0]
    accepted(*args, *mend.split())
    name = "language_model.model.norm.weight" if target == "hf" else "model.norm.weight"
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert found.dtype == torch.bfloat16 and found[:3].tolist() == [70144.0, -998244352.0, 65536.0]


def test_fault_21_an_overflow_keeps_the_old_output(tmp_path: Path) -> None:
    source, out = tiny(tmp_path), tmp_path / "out"
    accepted("pth", source, "--to", "xtuner", "-o", out)
    source = changed_pth(tmp_path, NORM, {0: 1e9})
    args = ("pth", source, "--to", "xtuner", "-o", out, "--force", "--max-shard-size", "20KB")
    refused(tmp_path, 7, NORM.removeprefix("llm."), args=args, mend="--dtype bfloat16")


def test_fault_21_flushed_values_are_counted(tmp_path: Path) -> None:
    state, cfg = trained()
    before = accepted("pth", tiny(tmp_path / "a"), "--to", "xtuner", "-o", tmp_path / "before", "--json")
    state[NORM] = state[NORM].clone()
    state[NORM][:5] = torch.tensor([1e-9, -1e-9, 0.0, 1e-30, 6e-8])  # the last is a subnormal float16
    source = write_pth(tiny(tmp_path / "b"), state, cfg)
    ran = accepted("pth", source, "--to", "xtuner", "-o", tmp_path / "out", "--json")
    assert ran.report["flushed_to_zero"] == before.report["flushed_to_zero"] + 3
    assert f"{ran.report['flushed_to_zero']:,} nonzero values became zero" in ran.stderr


# -- 30: JSON


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (None, ("config.json",)),
        (b'{"a": 1,}', ("line 1 column",)),
        (b'{\n "a": 1\n "b": 2}', ("line 3 column",)),
        (b"\xef\xbb\xbf{}", ("byte order mark",)),
        (b'{"hidden_size": NaN}', ("NaN", "line 1 column")),
        (b"\xff\xfe", ("byte order mark",)),
        (b"[]", ("config.json",)),
        (b"null", ("config.json",)),
        (b"", ("empty file",)),
        (b"<!DOCTYPE html><html>", ("web page",)),
    ],
    ids=["missing", "comma", "no comma", "bom", "nan", "utf-16", "list", "null", "empty", "page"],
)
@pytest.mark.parametrize("where", ["vit", "xtuner"])
def test_fault_30_config(
    corpus: Corpus, tmp_path: Path, where: str, content: bytes | None, fragments: tuple[str, ...]
) -> None:
    if where == "vit":
        source, layout = tiny(tmp_path), "pth"
        config, args = tmp_path / "tiny" / "vit" / "config.json", ("--visual-encoder", tmp_path / "tiny" / "vit")
    else:
        source, layout = corpus.copy("xtuner", tmp_path), "xtuner"
        config, args = source / "config.json", VIT
    if content is None:
        config.unlink()
    else:
        config.write_bytes(content)
    refused(tmp_path, 3, *fragments, args=(layout, source, "--to", "hf", "-o", tmp_path / "out", *args))


@pytest.mark.parametrize("content", [b"{,}", b"\xef\xbb\xbf{}"])
@pytest.mark.parametrize("layout", ["official", "hf"])
def test_fault_30_a_config_that_names_the_layout(corpus: Corpus, tmp_path: Path, layout: str, content: bytes) -> None:
    source = corpus.copy(layout, tmp_path)
    (source / "config.json").write_bytes(content)
    args = (layout, source, "--to", "xtuner", "-o", tmp_path / "out", *VIT)
    refused(tmp_path, 3, "config.json", "line 1 column", args=args)


ODD: dict[str, list[Any]] = {
    "config.json": [None, [], {}, "x", -1, 1.5, True, 10**30, [None]],
    "adapter_config.json": [None, [], {}, "x", -1, 1.5, True, 10**30, [None]],
    "conversion.json": [None, [], {}, "x", 7, {"rows": {"from": 10**9, "to": 576}, "tokens": [], "tokenizer": {}}],
}


@pytest.mark.parametrize(
    ("layout", "file", "target"),
    [
        ("hf", "config.json", "official"),
        ("hf", "conversion.json", "official"),
        ("official", "config.json", "hf"),
        ("xtuner", "config.json", "hf"),
        ("xtuner", "visual_encoder_adapter/adapter_config.json", "hf"),
    ],
)
def test_fault_30_no_odd_value_is_a_bug_of_ours(
    corpus: Corpus, tmp_path: Path, layout: str, file: str, target: str
) -> None:
    """Each key of a config, set to each odd value: planned or refused, with a sentence, never a traceback."""
    source = corpus.copy(layout, tmp_path)
    path = source / file
    content = json.loads(path.read_text())
    content = {k: v for k, v in content.items() if k != "tensors"}
    content.setdefault("added", {})
    values = ODD[path.name]
    for number, key in enumerate(content):
        for value in values if key == "added" else values[number % 9 :: 9]:
            path.write_text(json.dumps({**content, key: value}))
            ran = run(layout, source, "--to", target, "-o", tmp_path / "out", "--dry-run", "--quiet", *VIT)
            assert ran.code in (0, 3, 4, 5), f"{key} = {value!r}: exit {ran.code}, {ran.stderr}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [{"from": 10**9, "to": 10**9 + 64}, {"from": 512, "to": 577}, {"from": 0, "to": 576}])
def test_fault_30_a_record_of_rows_that_are_not_there(corpus: Corpus, tmp_path: Path, rows: dict[str, int]) -> None:
    source = corpus.copy("hf", tmp_path)
    added = json.loads((source / "conversion.json").read_text())["added"]
    edit_json(source / "conversion.json", added={**added, "rows": rows})
    args = ("hf", source, "--to", "official", "-o", tmp_path / "out")
    refused(tmp_path, 3, "conversion.json", args=args, mend="delete")


# -- 33: names of paths


@pytest.mark.parametrize(
    "name",
    ["with space", "ünïcödé 图片", "quote'\"$HOME`x`", "-dash", "new\nline", "a" * 200, "[bold]x[/bold]", "%s{}"],
)
def test_fault_33_odd_names_work(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    source = tiny(folder)
    out = folder / f"out {name[:40]}"
    ran = accepted("pth", source, "--to", "xtuner", "-o", out, "--json")
    assert ran.report["out"] == str(out) and (out / "config.json").is_file()
    assert run("verify", source, out).code == 0
    plain = tiny(tmp_path / "plain")
    accepted("pth", plain, "--to", "xtuner", "-o", plain.parent / out.name)
    assert tree(out) == tree(plain.parent / out.name)


@pytest.mark.parametrize("given", ["tiny/iter_2.pth", "./tiny//iter_2.pth", "tiny/../tiny/iter_2.pth"])
def test_fault_33_relative_paths_and_the_default_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    accepted("pth", given, "--to", "xtuner")
    assert (tmp_path / "iter_2_xtuner" / "config.json").is_file()


def test_fault_33_trailing_slashes(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.copy("xtuner", tmp_path)
    monkeypatch.chdir(tmp_path)
    accepted("xtuner", "xtuner/", "--to", "official", "-o", "out/", *VIT)
    accepted("xtuner", "xtuner/", "--to", "official", *VIT)
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "xtuner_official").keys()


def test_fault_33_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "tiny")
    accepted("pth", "~/tiny/iter_2.pth", "--to", "xtuner", "-o", "~/out")
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "tiny" / "~").exists()
    assert run("verify", "~/tiny/iter_2.pth", "~/out").code == 0
    refused(tmp_path, 2, "holds, the source", args=("pth", "~/tiny/iter_2.pth", "--to", "xtuner", "-o", "~"), mend="-o")


@pytest.mark.parametrize("name", ["missing.pth", "a" * 300, "~nobody.here/x", "missing/x.pth", "tiny/iter_2.pth/x"])
@pytest.mark.parametrize("command", ["pth", "convert", "inspect"])
def test_fault_33_sources_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    more = () if command == "inspect" else ("--to", "xtuner", "-o", tmp_path / "out")
    refused(tmp_path, 3, name[:100], "does not exist", args=(command, name, *more), mend="give a file or a folder")


@pytest.mark.parametrize("name", ["missing", "a" * 300, "~nobody.here/x", "missing/x/y", "tiny/iter_2.pth"])
def test_fault_33_bases_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    args = ("pth", source, "--to", "hf", "-o", tmp_path / "out", "--visual-encoder", name)
    said = "holds no whole vision tower" if name.endswith(".pth") else "base vision tower"
    refused(tmp_path, 3, said, name[:100], args=args, mend="--visual-encoder")
    state, cfg = trained()
    # Only a part that the checkpoint lacks can come from the first stage: here the tower.
    state = {key: value for key, value in state.items() if not key.startswith("visual_encoder.")}
    cfg = re.sub(r"visual_encoder_lora=dict\([^)]*\),?", "", cfg)
    write_pth(source, state, cfg.replace("pretrained_pth=None", f"pretrained_pth='{name}/x.pth'"))
    ran = accepted("pth", source, "--to", "xtuner", "-o", tmp_path / "out")
    assert "stage-1 checkpoint" in ran.stderr


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_fault_33_targets_that_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    source = tiny(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(tmp_path, 2, args=("pth", source, "--to", "xtuner", "--force", "-o", out), mend="-o")


def test_fault_33_a_target_name_that_is_too_long(tmp_path: Path) -> None:
    refused(tmp_path, 6, "too long", args=("pth", tiny(tmp_path), "--to", "xtuner", "-o", tmp_path / ("b" * 250)))


# -- 34: source and target are one


@pytest.mark.parametrize("how", ["same", "inside", "above", "base", "inside base", "link", "pth itself"])
def test_fault_34_source_and_target(corpus: Corpus, tmp_path: Path, how: str) -> None:
    source = corpus.copy("xtuner", tmp_path / "models")
    vit = Path(shutil.copytree(TINY / "vit", tmp_path / "bases" / "vit"))
    outs = {
        "same": source,
        "inside": source / "new",
        "above": tmp_path / "models",
        "base": vit,
        "inside base": vit / "new",
        "link": tmp_path / "link",
    }
    (tmp_path / "link").symlink_to(source)
    layout = "xtuner"
    if how == "pth itself":
        layout, source = "pth", tiny(tmp_path)
        outs[how] = source
    args = (layout, source, "--to", "hf", "--visual-encoder", vit, "-o", outs[how])
    refused(tmp_path, 2, "source", args=(*args, "--force"), mend="-o")


# -- 22, 23, 35: hostile sources


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("target", ["xtuner", "official", "hf"])
@pytest.mark.parametrize("where", ["meta", "state_dict", "root"])
def test_fault_35_a_pth_that_runs_code(tmp_path: Path, target: str, where: str) -> None:
    canary = tmp_path / "canary"
    state, cfg = trained()
    content: dict[str, Any] = {"meta": {"cfg": cfg}, "state_dict": dict(state)}
    if where == "root":
        content["hook"] = _Canary(canary)
    else:
        content[where]["hook"] = _Canary(canary)
    source = tiny(tmp_path)
    torch.save(content, source)
    for command in ("pth", "convert"):
        refused(tmp_path, 5, "system", "iter_2.pth", args=(command, source, "--to", target, "-o", tmp_path / "out"))
    refused(tmp_path, 5, "system", args=("inspect", source))
    refused(tmp_path, 5, "system", args=("verify", source, TINY))
    assert not canary.exists()


def test_fault_35_the_canary_would_notice(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("layout", ["official", "hf"])
def test_fault_35_a_bin_that_runs_code(corpus: Corpus, tmp_path: Path, layout: str) -> None:
    canary, source = tmp_path / "canary", corpus.copy(layout, tmp_path)
    (source / "model.safetensors").unlink()
    torch.save({EMBED: torch.ones(2), "x": _Canary(canary)}, source / "pytorch_model.bin")
    args = (layout, source, "--to", "xtuner", "-o", tmp_path / "out", *VIT)
    refused(tmp_path, 5, "pytorch_model.bin", "system", args=args)
    assert not canary.exists()


@pytest.mark.parametrize(
    "code", ["import os\nos.system('touch {canary}')", "exec(\"open('{canary}', 'w')\")", "x = ().__class__.__base__"]
)
@pytest.mark.parametrize("carried", [True, False])
def test_fault_35_a_config_that_runs_code(tmp_path: Path, code: str, carried: bool) -> None:
    canary, (state, cfg) = tmp_path / "canary", trained()
    hostile = code.format(canary=canary) + "\n" + cfg
    source = write_pth(tiny(tmp_path), state, hostile if carried else cfg)
    more: tuple[str | Path, ...] = ()
    if not carried:
        (tmp_path / "evil.py").write_text(hostile)
        more = ("--config", tmp_path / "evil.py")
    args = ("pth", source, "--to", "hf", "-o", tmp_path / "out", *more)
    refused(tmp_path, 5, "meta.cfg" if carried else "evil.py", args=args)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "C:\\x.safetensors", "\\\\srv\\x", "", "a\nb"]
)
@pytest.mark.parametrize("command", ["hf", "convert", "inspect", "verify"])
def test_fault_22_an_index_that_leaves_its_folder(corpus: Corpus, tmp_path: Path, command: str, name: str) -> None:
    source = corpus.copy("hf", tmp_path)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    more = {"inspect": (), "verify": (corpus.layouts["official"],)}.get(
        command, ("--to", "official", "-o", tmp_path / "out")
    )
    refused(tmp_path, 5, "model.safetensors.index.json", "weight_map", args=(command, source, *more))


def test_fault_23_a_shard_that_is_a_link_out(corpus: Corpus, tmp_path: Path) -> None:
    source = corpus.copy("hf", tmp_path)
    (source / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (source / "model.safetensors").symlink_to("../secret.safetensors")
    args = ("hf", source, "--to", "official", "-o", tmp_path / "out")
    refused(tmp_path, 5, "link that leaves its folder", args=args)


def test_fault_39_a_zip_bomb_in_place_of_a_pth(tmp_path: Path) -> None:
    source, buffer = tiny(tmp_path), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    source.write_bytes(buffer.getvalue())
    ran = run("pth", source, "--to", "hf", "-o", tmp_path / "out")
    assert ran.code in (3, 5) and not (tmp_path / "out").exists() and "bug" not in ran.stderr


# -- 72: the source changes while it is read


@pytest.mark.parametrize("how", ["truncated", "rewritten", "replaced", "touched header"])
@pytest.mark.parametrize("layout", ["pth", "official"])
def test_fault_72_the_source_changes(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, how: str
) -> None:
    """Another process writes the source when the first bytes of it have been copied."""
    source = corpus.copy(layout, tmp_path)
    file = source / "model.safetensors" if layout == "official" else source
    (tmp_path / "old").mkdir()
    out = tmp_path / "old" / "out"
    accepted(layout, source, "--to", "xtuner", "-o", out, *VIT)
    before = tree(tmp_path / "old")
    opened, real, done = file.stat(), FilePool.open, []

    def interfere(pool: FilePool, path: Path) -> int:
        fd = real(pool, path)
        if path == file and not done:
            done.append(True)
            data = bytearray(file.read_bytes())
            if how == "truncated":
                os.truncate(file, len(data) // 3)
            elif how == "rewritten":
                data[-5] ^= 1
                file.write_bytes(data)
            elif how == "replaced":
                (tmp_path / "other").write_bytes(data)
                (tmp_path / "other").rename(file)
            else:
                data[20] ^= 1
                with file.open("r+b") as stream:
                    stream.write(data[:100])
                os.utime(file, ns=(opened.st_atime_ns, opened.st_mtime_ns))
        return fd

    monkeypatch.setattr(FilePool, "open", interfere)
    ran = run(layout, source, "--to", "xtuner", "-o", out, "--force", *VIT)
    assert done and ran.code == 3 and len(ran.errors) == 1, ran.stderr
    assert file.name in ran.errors[0]
    assert "changed while it was read" in ran.errors[0] or "truncated" in ran.errors[0]
    assert tree(tmp_path / "old") == before
    assert_clean(tmp_path)


def test_fault_72_the_source_goes_before_it_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny(tmp_path)
    real = execute.execute

    def gone(*args: Any, **options: Any) -> Any:
        source.unlink()
        return real(*args, **options)

    monkeypatch.setattr(conversion, "execute", gone)
    ran = run("pth", source, "--to", "xtuner", "-o", tmp_path / "out")
    assert ran.code == 3 and "iter_2.pth" in ran.errors[0], ran.stderr
    assert not (tmp_path / "out").exists()
    assert_clean(tmp_path)


# -- 79: code that travels with a model


def test_fault_79_code_beside_a_base_is_never_run_nor_copied(tmp_path: Path) -> None:
    canary, source = tmp_path / "canary", tiny(tmp_path)
    hostile = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
    for part in ("llm", "vit"):
        folder = tmp_path / "tiny" / part
        names = ("modeling_evil", "configuration_evil", "tokenization_evil", "__init__", "sitecustomize", "conftest")
        for name in names:
            (folder / f"{name}.py").write_text(hostile)
        auto = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
        edit_json(folder / "config.json", auto_map=auto, trust_remote_code=True)
        if part == "llm":
            edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})
    for target in ("xtuner", "official", "hf"):
        out = tmp_path / target
        run_it = partial(shell, cwd=tmp_path / "tiny" / "vit") if target == "xtuner" else run
        ran = run_it("pth", source, "--to", target, "-o", out)
        assert ran.code == 0, ran.stderr
        assert not [p for p in out.rglob("*.py") if "evil" in p.name]
        assert "evil" not in (out / "config.json").read_text()
        assert run("verify", source, out).code == 0
    assert not canary.exists()


@pytest.mark.parametrize("part", ["llm", "vit"])
def test_fault_79_a_family_that_only_its_own_code_knows(tmp_path: Path, part: str) -> None:
    source = tiny(tmp_path)
    folder = tmp_path / "tiny" / part
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    edit_json(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "modeling_evil.C"})
    args = ("pth", source, "--to", "hf", "-o", tmp_path / "out")
    refused(tmp_path, 4, "'evil'", args=args, mend="known: ")


def test_bases_of_the_corpus_are_whole() -> None:
    """The other tests name them."""
    assert all(Path(p).is_dir() for p in bases()[1::2])
