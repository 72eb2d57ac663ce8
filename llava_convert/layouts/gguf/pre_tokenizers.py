"""Which of llama.cpp's pre-tokenizers cuts text as a tokenizer does, found by letting both cut the same text.

A hash of ids, by which converters usually tell, changes with a BOS token or a grown vocabulary; how text is cut does
not. Both sides run in the tokenizers library: the tokenizer's own component, and one built of the table's patterns.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from typing import Any

from llava_convert.assets.tokenizer.files import Tokenizer
from llava_convert.core.errors import UnsupportedError, not_a_choice
from llava_convert.core.resources import data_dir
from llava_convert.core.values import dataclass

# Cases that the cuts of known models differ in: letters after signs, runs of digits, apostrophes, spaces and line ends
# of every kind, combining marks, scripts without spaces.
PROBES = (
    "Hello, world! I'll say it's you're WE'VE don'T I'D 'sure 'RE",
    "1 12 123 1234 12345 1234567 3.14159 v2.0 x86_64 ½ ² Ⅷ ٣٤٥",
    "  two  three   four    five \t tab\t\ttabs\n\nlines\r\n\r\n  \n \n x\u00a0y\u3000z ",
    "naïve café e\u0301tude Ångström ǅ ß İstanbul straße ʰ ª",
    "我们在2024年看到了3只猫。你好,世界! カタカナ ひらがな 한국어 ไทย हिन्दी العربية עברית",
    "def f(x_1): return x+=1 // a->b <|x|> [y] {z} ... !!! ??? --- ___ #!/bin/sh $HOME 100% a@b.c",
    '🙂🙃 👩‍👩‍👧 e🙂x .. \n. \n\n- a/b\\c "quoted" ‘curly’ “double” — … •',
    "CamelCase mixedCASE lowerUPPER A a.B (c)D 'e' f'g h!i /path/to/file\n/x \r y",
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A row of mappings/gguf/pre_tokenizers.toml, whose head explains the fields."""

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False
    normalizer: str = ""

    def component(self) -> dict[str, Any]:
        """The pre-tokenizer as tokenizer.json writes it."""
        steps: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.splits
        ]
        return {"type": "Sequence", "pretokenizers": [*steps, _BYTES]}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@cache
def pre_tokenizers() -> Mapping[str, PreTokenizer]:
    """Every row by its name, in the order of preference."""
    raw = tomllib.loads((data_dir("mappings") / "gguf" / "pre_tokenizers.toml").read_text(encoding="utf-8"))
    return {row["name"]: PreTokenizer(**{**row, "splits": tuple(row["splits"])}) for row in raw["pre"]}


def pre_tokenizer_of(tokenizer: Tokenizer, asked: str | None = None) -> str:
    """The name that llama.cpp knows the tokenizer's cut by, or the one `asked` for.

    Raises UsageError for an asked name that is not known; UnsupportedError (exit 4) where no known one cuts alike.
    """
    known = pre_tokenizers()
    if asked is not None:
        if asked not in known:
            raise not_a_choice("--pre", asked, known)
        return asked
    if tokenizer.fast:
        ours = _cuts(tokenizer.fast.get("pre_tokenizer"))
        alike = [row for row in known.values() if _cuts(row.component()) == ours]
        merging = bool((tokenizer.fast.get("model") or {}).get("ignore_merges"))
        for row in sorted(alike, key=lambda row: row.ignore_merges != merging):
            return row.name
    raise UnsupportedError(
        f"{tokenizer.where}: its pre-tokenizer splits text differently from every pre-tokenizer known for GGUF",
        hint=f"if you know its name in llama.cpp, give it by --pre: {', '.join(known)}",
    )


def _cuts(component: Any) -> list[list[str]] | None:
    """How a pre-tokenizer cuts the probes; None where the library cannot build it."""
    import tokenizers

    text = {"version": "1.0", "pre_tokenizer": component, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        built = tokenizers.Tokenizer.from_str(json.dumps(text)).pre_tokenizer
    except Exception as problem:  # what the library raises has no class of its own
        raise UnsupportedError(f"the tokenizer's pre-tokenizer cannot be built: {problem}") from None
    if built is None:
        return None
    return [[piece for piece, _ in built.pre_tokenize_str(probe)] for probe in PROBES]
