"""Reports: whole in one file, with what was found, and nothing of a stranger taken for markup."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llava_convert
from llava_convert.app.logits.compare import Logits, Said, Site
from llava_convert.app.mmbench.answers import Answers
from llava_convert.app.mmbench.data import read_benchmark
from llava_convert.app.pages.mmbench_page import mmbench_page
from llava_convert.app.pages.verify_page import verify_page
from llava_convert.cli import app
from tests.mmbench_files import questions, write_tsv

_ALONE = {"meta", "img"}
VERSIONS = f"llava-convert {llava_convert.__version__}, python "


class Page(HTMLParser):
    """The text of a page; its tags must be closed in order."""

    def __init__(self, made: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images = 0
        self.said = ""
        self.feed(made)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in _ALONE else [tag]
        self.images += tag == "img"
        for name, value in attrs:
            assert name not in ("href", "onload", "onerror")
            assert name != "src" or str(value).startswith("data:image/png;base64,")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data + " "


def test_verify(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out, dtype="float32")
    same = tmp_path / "same.html"
    llava_convert.verify(tiny / "iter_2.pth", out, report=same)
    said = Page(same.read_text()).said
    assert "the same" in said and "http" not in same.read_text()
    assert re.search(r"0 facts differ, \d\d are alike", said)
    assert re.search(r"language_model.rope_theta\s+500000.0\s+500000.0\s", said)
    tensors = load_file(out / "model.safetensors")
    for layer in (0, 1):
        tensors[f"language_model.model.layers.{layer}.mlp.up_proj.weight"] += layer + 0.5
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"vision_feature_layer": -1}
    (out / "config.json").write_text(json.dumps(config))
    found = CliRunner().invoke(app, ["verify", str(tiny / "iter_2.pth"), str(out), "--report", str(same)])
    assert found.exit_code == 7
    said = Page(same.read_text()).said
    assert "not the same" in said and "language_model.model.layers.N.mlp.up_proj.weight" in said
    assert re.search(r"up_proj.weight\s+0, 1\s+16,384\s+1.5", said)
    facts = said.partition("Facts side by side")[2]
    assert re.search(
        r"^\s+1 fact differs, \d\d are alike\s+fact\s+source\s+output\s+vision.feature_layer\s+2\s+3\s", facts
    )


def test_where_the_sides_come_from(tiny: Path, tmp_path: Path) -> None:
    """Of each side its files; of OUT what its record says, and whether SOURCE is what that names."""
    out, other = tmp_path / "out", tmp_path / "other.pth"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out, digest=True)
    llava_convert.convert(out, to="pth", out=other)
    pages = {}
    for source, name, code in ((tiny / "iter_2.pth", "own", 0), (other, "changed", 7)):  # another chat template
        words = ["verify", str(source), str(out), "--llm", str(tiny / "llm"), "--visual-encoder", str(tiny / "vit")]
        found = CliRunner().invoke(app, [*words, "--report", str(tmp_path / f"{name}.html")])
        assert found.exit_code == code, found.output
        pages[name] = Page((tmp_path / f"{name}.html").read_text()).said.partition("Where it comes from")[2]
        assert f"llava-convert {shlex.join(words)} --report" in pages[name] and VERSIONS in pages[name]
    own, changed = (" ".join(page.split()) for page in pages.values())
    size = (tiny / "iter_2.pth").stat().st_size
    (digest,) = json.loads((out / "conversion.json").read_text())["sources"][0]["files"]
    line = f"iter_2.pth: {size:,} bytes, sha256 of its first and last MiB {digest['sha256'][:16]}…"
    assert own.count(line) == 2 and f"made of its source {line} (that of SOURCE)" in own
    assert f"made of its source {line} (not one of SOURCE's)" in changed
    assert f"converted by llava-convert {llava_convert.__version__}, tables 1 converted from pth to hf" in own
    tensors = len(json.loads((out / "conversion.json").read_text())["tensors"])
    assert f"digests of tensors {tensors} of {tensors} (xxh3-128)" in own
    assert "base language model tiny/llm base vision tower tiny/vit" in own
    (out / "conversion.json").unlink()
    llava_convert.verify(tiny / "iter_2.pth", out, report=tmp_path / "bare.html")
    assert "record no conversion.json beside it" in " ".join(Page((tmp_path / "bare.html").read_text()).said.split())


def test_logits_and_strangers(tiny: Path, tmp_path: Path) -> None:
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=tmp_path / "o")
    verdict = llava_convert.verify(tiny / "iter_2.pth", tmp_path / "o")
    said = Said("wide picture", "<script>alert(1)</script>", "other", 0.5, 0.25, 3)
    sites = (Site("pixels", 0.0, 0.0), Site("logits", 2.0, 0.5))
    made = verify_page(replace(verdict, logits=Logits("float16", 8e-3, sites, (said,))))
    page = Page(made)
    assert "<script>" not in made and "<script>alert(1)</script>" in page.said
    assert page.images == 1 and "the models part at logits" in page.said and "part at token 3" in page.said


def test_mmbench(tmp_path: Path) -> None:
    benchmark = read_benchmark(write_tsv(tmp_path / "dev.tsv", questions()))
    answers = {q.index: str(q.answer) for q in benchmark.questions} | {3: "Z"}
    page = Page(mmbench_page(benchmark, answers, {"source": "m"}))
    assert page.images == len(benchmark.questions) and re.search(r"Average\s+83.3 %", page.said)
    first = page.said.partition("Answers")[2]
    assert first.index("Where is it?") < first.index("What is it?")


def test_compare(tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "dev.tsv", questions())
    rows = {q.index: str(q.answer) for q in read_benchmark(data).questions}
    about = {"data": hashlib.sha256(data.read_bytes()).hexdigest()}
    for name, changed in (("a", {}), ("b", {1: "D", 4: "none"})):
        (tmp_path / name).mkdir()
        with Answers(tmp_path / name, {**about, "model": name}, 0) as kept:
            for index, answer in (rows | changed).items():
                kept.add(index, answer)
    words = ["eval", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--data", str(data)]
    found = CliRunner().invoke(app, [*words, "--report", str(tmp_path / "c.html"), "--json"])
    assert found.exit_code == 0, found.output
    value = json.loads(found.stdout)
    assert (value["changed"], value["questions"], value["averages"]) == (2, 9, [1.0, pytest.approx(4 / 6)])
    page = Page((tmp_path / "c.html").read_text())
    assert page.images == 2 and "How many?" in page.said and "What is it?" not in page.said
    assert page.said.count("no provenance.json beside them") == 2 and "llava-convert eval compare" in page.said
    (tmp_path / "b" / "answers-0.jsonl").write_text(json.dumps({**about, "data": "other"}) + "\n")
    assert CliRunner().invoke(app, words).exit_code == 3
