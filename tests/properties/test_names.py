"""Patterns and names, whatever they are."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from llava_convert.core.text import printable
from llava_convert.model.tables.names import grouped
from llava_convert.model.tables.patterns import Pattern

# Few letters, so that random patterns and names often meet.
words = st.sampled_from(["a", "b", "0", "1"])
segments = st.one_of(words, words, st.sampled_from(["{x}", "{y}", "{z...}"]))


@st.composite
def _texts(draw: st.DrawFn) -> str:
    parts = draw(st.lists(segments, min_size=1, max_size=4))
    once: list[str] = []
    for part in parts:  # a placeholder stands once in a pattern
        once.append("a" if part.startswith("{") and part in once else part)
    return ".".join(once)


texts = _texts()
REST = {"{x}", "{y}", "{z*}"}
names = st.lists(words, min_size=1, max_size=7).map(".".join)


@st.composite
def patterns_of(draw: st.DrawFn, name: str) -> Pattern:
    """A pattern which matches `name`: some segments become placeholders, perhaps one run of them becomes the rest."""
    parts = name.split(".")
    made = [f"{{p{i}}}" if draw(st.booleans()) else part for i, part in enumerate(parts)]
    if draw(st.booleans()):
        start = draw(st.integers(0, len(parts) - 1))
        made[start : draw(st.integers(start + 1, len(parts)))] = ["{rest...}"]
    return Pattern.parse(".".join(made))


@given(st.data(), names)
def test_fill_undoes_match(data: st.DataObject, name: str) -> None:
    pattern = data.draw(patterns_of(name))
    bindings = pattern.match(name)
    assert bindings is not None
    assert set(bindings) == pattern.placeholders
    assert pattern.fill(bindings) == name


@given(texts, st.lists(words, min_size=3, max_size=3), st.lists(words, min_size=1, max_size=4))
def test_match_undoes_fill(text: str, one: list[str], rest: list[str]) -> None:
    pattern = Pattern.parse(text)
    values = dict(zip(["{x}", "{y}", "{z}"], one, strict=True)) | {"{z*}": ".".join(rest)}
    bindings = {key: values[key] for key in pattern.placeholders}
    assert pattern.match(pattern.fill(bindings)) == bindings


@given(st.data(), names)
def test_patterns_that_meet_overlap(data: st.DataObject, name: str) -> None:
    """If a name matches both, the loader must refuse the pair."""
    one, other = data.draw(patterns_of(name)), data.draw(patterns_of(name))
    assert one.overlaps(other) and other.overlaps(one)


@settings(max_examples=60)
@given(texts, texts)
def test_overlap_is_no_guess(one: str, other: str) -> None:
    """Patterns are said to overlap exactly when there is a name of both: looked for among all that could be."""
    a, b = Pattern.parse(one), Pattern.parse(other)
    # With one rest a pattern no name need be longer than both together; a letter of neither stands for all others.
    alphabet = [*sorted({s for s in (*a.segments, *b.segments) if "{" not in s})[:2], "q"]
    longest = min(len(a.segments) + len(b.segments), 5)
    shared = any(
        a.match(name) is not None and b.match(name) is not None
        for length in range(1, longest + 1)
        for name in map(".".join, product(alphabet, repeat=length))
    )
    assert a.overlaps(b) >= shared
    if longest == len(a.segments) + len(b.segments) and len(alphabet) == len({*a.segments, *b.segments, "q"} - REST):
        assert a.overlaps(b) == shared


@given(st.lists(st.text(max_size=300), min_size=1, max_size=200))
def test_grouped_never_fails_and_is_bounded(found: list[str]) -> None:
    text = grouped(found)
    assert text.isprintable() or not text
    assert len(text) <= 12 * 460 + 30


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=60))
def test_grouped_tells_a_run_from_a_choice(layers: set[int]) -> None:
    text = grouped(f"layers.{i}.w" for i in layers)
    if len(layers) == 1:
        assert text == f"layers.{min(layers)}.w"
    elif max(layers) - min(layers) + 1 == len(layers):
        assert text == f"layers.{{{min(layers)}…{max(layers)}}}.w"
    else:
        assert text.startswith(f"layers.{{{min(layers)},")


@given(st.text(max_size=1000))
def test_printable_is(name: str) -> None:
    assert printable(name).isprintable() or printable(name) == ""
    assert len(printable(name)) <= 201
    if name.isprintable() and len(name) <= 200:
        assert printable(name) == name
