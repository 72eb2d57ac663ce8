"""Every kind of page in a real browser: nothing is wider than the screen, nothing is fetched, nothing complains.

Looked at as a desktop and as a phone show it, in light and in dark.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import llava_convert
from llava_convert.app.benchmarks.lmms import Asked
from llava_convert.app.benchmarks.table import Score
from llava_convert.app.logits.compare import Logits, Said, Site
from llava_convert.app.mmbench.data import read_benchmark
from llava_convert.app.pages.mmbench_page import compare_page, mmbench_page
from llava_convert.app.pages.provenance_part import provenance_part
from llava_convert.app.pages.tasks_page import tasks_page
from llava_convert.app.pages.verify_page import verify_page
from llava_convert.app.provenance import Made
from llava_convert.engine.compare import Difference
from tests.mmbench_files import questions, write_tsv

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium: apt install chromium")

WIDTHS = (1280, 390)
SCHEMES = {"light": 1, "dark": 0}  # blink's PreferredColorScheme
# Every frame is a page at one width; the script says what each of them is like once all have been laid out.
SCRIPT = """
<script>onload = () => { const found = [...document.querySelectorAll("iframe")].map(f => {
  const d = f.contentDocument, b = f.contentWindow.getComputedStyle(d.body);
  const names = f.contentWindow.performance.getEntriesByType("resource").map(r => r.name);
  return { name: f.name, fetched: names.filter(n => !n.startsWith("data:")), back: b.backgroundColor,
    over: d.documentElement.scrollWidth - d.documentElement.clientWidth, text: b.color,
    broken: [...d.images].filter(i => !i.naturalWidth).length, words: d.body.innerText.length,
    cut: [...d.querySelectorAll("td.short")].filter(c => c.innerText && c.getClientRects().length &&
      c.scrollWidth > c.clientWidth + 1).length };
}); document.title = "done"; document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>"; }</script>
"""


@pytest.fixture(scope="module")
def pages(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    llava_convert.inspect(tiny / "iter_2.pth", html=folder / "inspect.html")
    llava_convert.inspect(tiny / "picture.png", html=folder / "other.html")
    out = folder / "a folder with a long name that no phone has room for" / "and_another_that_has_no_space_at_all_in_it"
    llava_convert.convert(tiny / "iter_2.pth", to="hf", out=out)
    verdict = llava_convert.verify(tiny / "iter_2.pth", out, report=folder / "verify.html")
    made = Made.now(f"llava-convert verify {tiny / 'iter_2.pth'} '{out}' --report {'r' * 120}.html")
    name = "language_model.model.layers.{}.self_attn.q_proj.weight"
    bad = replace(
        verdict,
        different={name.format(i): Difference(4096, 0.1 * (i + 1)) for i in range(32)},
        missing=("vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.weight",),
        logits=Logits(
            "float16", 8e-3,
            tuple(Site(f"language_model.layers.{i}", 10.0**-i, 10.0**-i) for i in range(8)),
            (Said("square picture", "one " * 40, "x" * 300, 0.5, 0.25, 1), Said("text", "a", "a", 0.0, 1.0, None)),
            "llama.cpp", "tower, projector",
        ),
    )  # fmt: skip
    benchmark = read_benchmark(write_tsv(folder / "dev.tsv", questions()))
    answers = {question.index: "A " + "y" * 200 for question in benchmark.questions}
    others = {question.index: "B" for question in benchmark.questions}
    assert verdict.provenance is not None
    told = dict(verdict.provenance[1].rows(verdict.provenance[0]))
    origin = provenance_part({"one/" + "z" * 90: told, "two": {"path": "p" * 200}}, made)
    picture = benchmark.picture(benchmark.questions[0])
    return {
        "inspect": (folder / "inspect.html").read_text(),
        "inspect of a picture": (folder / "other.html").read_text(),
        "verify, the same": (folder / "verify.html").read_text(),
        "verify, not the same": verify_page(bad, made),
        "mmbench": mmbench_page(benchmark, answers, {"source": "s" * 200, "resumed": 0}, origin),
        "compare": compare_page(benchmark, {"one/" + "z" * 90: answers, "two": others}, origin)[0],
        "tasks": tasks_page("m", [Score("pope", "f1", 0.5)], [Asked("t", "w" * 300, [picture], "one")], origin),
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pages(pages: dict[str, str], tmp_path: Path, scheme: str) -> None:
    assert BROWSER is not None
    frames = [
        f'<iframe name="{name}, {width}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{html.escape(page, quote=True)}"></iframe>'
        for name, page in pages.items()
        for width in WIDTHS
    ]
    top = '<!doctype html><meta name="color-scheme" content="light dark">'
    (tmp_path / "all.html").write_text(top + SCRIPT + "".join(frames), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--enable-logging=stderr",
            "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "all.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    said = re.search("<pre id=.found.>(.*?)</pre>", done.stdout, re.DOTALL)
    assert said is not None, done.stderr[-2000:]
    found = json.loads(html.unescape(said[1]))
    assert [one["name"] for one in found] == [f"{name}, {width}" for name in pages for width in WIDTHS]
    for one in found:
        wrong = {key: one[key] for key in ("over", "fetched", "broken", "cut") if one[key] and one[key] != []}
        assert not wrong and one["words"] > 100, one
        assert contrast(one["back"], one["text"]) > 7, one
        assert (luminance(one["back"]) > 0.5) == (scheme == "light")
    assert "CONSOLE" not in done.stderr


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.1)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
