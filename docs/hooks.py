"""What the site takes from beside `docs`: pages at the root of the repository, under names of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    for name, page in BESIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def _bars(code: re.Match[str]) -> str:
    return code[0].replace("\\|", "|")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of `docs` lead to the pages of the site that hold what lies there.

    A bar within code in a table is written with a backslash for GitHub; Python-Markdown would show that.
    """
    markdown = re.sub(r"^\|.*$", lambda row: re.sub(r"`[^`]+`", _bars, row[0]), markdown, flags=re.M)
    return re.sub(r"\]\((?:\.\./)+([A-Z]+\.md)", lambda found: f"]({BESIDE[found[1]]}", markdown)
