"""No key of a small file that real programs save is unknown, and no value of another type than the tables say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_convert.model.configs import old_flavour
from llava_convert.model.tables.facts import key_table, stated_in, unknown_keys
from llava_convert.model.tables.families import Architecture, architectures
from llava_convert.model.tables.types import check_types
from tests.conftest import CHECKOUT
from tests.interop.peer_programs import PEERS, SCRIPTS, in_peer

TABLES = {
    "generation_config.json": ("generation", "common"),
    "preprocessor_config.json": ("processor", "common"),
    "processor_config.json": ("processor", "common"),
    "tokenizer_config.json": ("tokenizer",),
    "adapter_config.json": ("adapter",),
}
HALVES = {"text_config": "language_model", "vision_config": "vision_tower"}
PROJECTOR = "projector/config.json"


def unknown(file: Path) -> list[str]:
    """The keys of a small file that no table has, those of its nested configs by their path."""
    content = json.loads(file.read_text(encoding="utf-8"))
    check_types(content, file.name, str(file))
    if file.name != "config.json":
        inner = content.get("image_processor")
        nested = unknown_keys(inner, TABLES[file.name]) if isinstance(inner, dict) else []
        return unknown_keys(content, TABLES[file.name]) + [f"image_processor.{key}" for key in nested]
    if file.parent.name == "projector":
        return unknown_keys(content, ("projector",), stated_in("xtuner", PROJECTOR))
    if content.get("model_type") in ("clip", "siglip"):  # a tower inside the whole model: its half is read
        return of_a_part(content["vision_config"], "vision_tower")
    if "text_config" in content or content.get("model_type") == "llava":
        found = unknown_keys(old_flavour(content), ("hf", "common"), (*stated_in("hf"), *HALVES))
        halves = ((name, part) for name, part in HALVES.items() if name in content)
        return found + [f"{name}.{key}" for name, part in halves for key in of_a_part(content[name], part)]
    if any(key.startswith("mm_") for key in content):
        text = of_a_part(content, "language_model")
        return [key for key in text if not key_table("official").knows(key) and key not in stated_in("official")]
    return of_a_part(content, "vision_tower" if "vision" in content["model_type"] else "language_model")


def of_a_part(content: dict[str, Any], part: str) -> list[str]:
    return unknown_keys(old_flavour(content), (part, "common"), own_keys(part, content["model_type"]))


def own_keys(part: str, model_type: str) -> set[str]:
    """What the table of the family names itself."""
    plain = model_type.removeprefix("llava_")
    table: Architecture | None = next(
        (a for a in architectures().values() if a.part == part and plain in (*a.model_types, "llava")), None
    )
    if table is None:
        return set()
    return {*table.defaults, *(w for formulas in table.symbols.values() for f in formulas for w in f.split())}


def small_files(folder: Path) -> Iterator[Path]:
    names = {*TABLES, "config.json"}
    return (file for file in sorted(folder.rglob("*.json")) if file.name in names)


def unknown_under(folder: Path) -> dict[str, list[str]]:
    found = {str(file.relative_to(folder)): unknown(file) for file in small_files(folder)}
    assert found, f"no small files under {folder}"
    return {name: keys for name, keys in found.items() if keys}


def test_of_the_real_converters(golden: Path) -> None:
    assert len(list(small_files(golden))) > 50
    assert unknown_under(golden) == {}


def test_of_the_fixtures() -> None:
    assert unknown_under(CHECKOUT / "fixtures" / "tiny") == {}


def test_of_this_release_of_transformers(tiny: Path, tmp_path: Path) -> None:
    job = {"out": str(tmp_path / "out"), "tokenizer": str(tiny / "llm")}
    (tmp_path / "out").mkdir()
    command = [sys.executable, str(SCRIPTS / "save_configs.py"), str(tmp_path / "result.json")]
    subprocess.run(command, input=json.dumps(job), text=True, check=True, capture_output=True, env={**os.environ})
    assert len(list(small_files(tmp_path / "out"))) > 25
    assert unknown_under(tmp_path / "out") == {}


@pytest.mark.peers
@pytest.mark.parametrize("environment", ["transformers-4.37", "transformers-4.46", "transformers-4.57", "llava"])
def test_of_older_releases(tiny: Path, tmp_path: Path, environment: str) -> None:
    (tmp_path / "out").mkdir()
    job = {"out": str(tmp_path / "out"), "tokenizer": str(tiny / "llm")}
    report = in_peer(environment, "save_configs.py", job, tmp_path)
    assert unknown_under(tmp_path / "out") == {}
    put = dict.fromkeys(report["llava"], "said")
    assert (environment == "llava") == bool(put)
    known = (*stated_in("official"), *own_keys("language_model", "llama"))
    assert unknown_keys(put, ("official", "language_model", "common"), known) == []


@pytest.mark.peers
def test_of_the_real_xtuner() -> None:
    folder = PEERS / "cases"
    if not folder.is_dir():
        pytest.skip("no cases: `make peers`, then `.venvs/xtuner/bin/python tests/peers/xtuner_cases.py` makes them")
    assert unknown_under(folder) == {}


def test_a_key_of_nobody_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava", "text_config": {"model_type": "llama", "gate": 1}}')
    assert unknown(tmp_path / "config.json") == ["text_config.gate"]
    (tmp_path / "generation_config.json").write_text('{"of_nobody": true, "of_nobody_and_null": null}')
    assert unknown_under(tmp_path)["generation_config.json"] == ["of_nobody"]
