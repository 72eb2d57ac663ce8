"""Links that leave a model's folder, in place of every file and subfolder that is read; links that are usual pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.corpus import TINY, Corpus, accepted, bases, edit_json, refused

SECRET = "-----BEGIN PRIVATE KEY----- of the machine\n"
# A tokenizer's other files are written where a folder has none, so that each reader meets its link.
BESIDE = (
    "config.json",
    "generation_config.json",
    "merges.txt",
    "vocab.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "conversion.json",
    "README.md",
)
FILES = {
    "hf": ("model.safetensors", "preprocessor_config.json", "processor_config.json", *BESIDE),
    "official": ("model.safetensors", "preprocessor_config.json", *BESIDE),
    "xtuner": (
        "visual_encoder_adapter",
        "visual_encoder_adapter/adapter_config.json",
        "visual_encoder_adapter/adapter_model.safetensors",
        "projector",
        "projector/model.safetensors",
        "xtuner_config.py",
        *BESIDE,
    ),
}
TARGET = {"hf": "official", "official": "hf", "xtuner": "official"}


def lead_out(place: Path, away: Path) -> None:
    """Put what is at `place` (or a secret) elsewhere, and a link in its stead."""
    away.mkdir(exist_ok=True)
    target = away / place.name
    if place.exists():
        shutil.move(place, target)
    else:
        target.write_text(json.dumps({"key": SECRET}) if place.suffix == ".json" else SECRET)
    place.symlink_to(target)


@pytest.mark.parametrize(("layout", "file"), [(layout, file) for layout, files in FILES.items() for file in files])
def test_a_link_out_of_the_source(corpus: Corpus, tmp_path: Path, layout: str, file: str) -> None:
    source = corpus.copy(layout, tmp_path)
    lead_out(source / file, tmp_path / "home")
    options = bases() if layout == "xtuner" else ()
    args = (layout, source, "--to", TARGET[layout], "-o", tmp_path / "out", *options)
    refused(tmp_path, 5, file.split("/")[-1], "is a link that leaves its folder", args=args, mend="put the file itself")


@pytest.mark.parametrize("to", ["gguf", "xtuner"])
@pytest.mark.parametrize("file", ["merges.txt", "chat_template.jinja"])
def test_whatever_the_target(corpus: Corpus, tmp_path: Path, to: str, file: str) -> None:
    source = corpus.copy("hf", tmp_path)
    lead_out(source / file, tmp_path / "home")
    refused(tmp_path, 5, "leaves its folder", args=("hf", source, "--to", to, "-o", tmp_path / "out"))


@pytest.mark.parametrize("file", ["llm/config.json", "llm/tokenizer.json", "vit/preprocessor_config.json"])
def test_a_link_out_of_a_base(tmp_path: Path, file: str) -> None:
    shutil.copytree(TINY, tmp_path / "tiny")
    lead_out(tmp_path / "tiny" / file, tmp_path / "home")
    args = ("pth", TINY / "iter_2.pth", "--to", "hf", "-o", tmp_path / "out", *bases(tmp_path / "tiny"))
    refused(tmp_path, 5, "leaves its folder", args=args)


@pytest.fixture(scope="module")
def gguf(corpus: Corpus) -> Path:
    accepted("hf", corpus.layouts["hf"], "--to", "gguf", "-o", corpus.folder / "gguf", "--name", "m")
    return corpus.folder / "gguf"


@pytest.mark.parametrize("file", ["m-f16.gguf", "m-mmproj-f16.gguf"])
@pytest.mark.parametrize("named", ["the folder", "the language model"])
def test_a_link_out_of_a_folder_of_gguf(gguf: Path, tmp_path: Path, file: str, named: str) -> None:
    """A file that the user names may be a link; what is found beside it may not."""
    source = Path(shutil.copytree(gguf, tmp_path / "gguf"))
    llm = next(path.name for path in source.glob("m-*.gguf") if "mmproj" not in path.name)
    file = file if "mmproj" in file else llm
    lead_out(source / file, tmp_path / "home")
    shown = source if named == "the folder" else source / llm
    args = ("gguf", shown, "--to", "hf", "-o", tmp_path / "out")
    if named == "the folder" or "mmproj" in file:
        refused(tmp_path, 5, "leaves its folder", args=args)
    else:
        accepted(*args)


def test_a_link_that_has_no_part_in_it(gguf: Path, tmp_path: Path) -> None:
    """A folder of links to many models: naming one of its files is enough."""
    source = Path(shutil.copytree(gguf, tmp_path / "gguf"))
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    (source / "other.gguf").symlink_to(tmp_path / "other.gguf")
    (source / "notes.json").symlink_to(tmp_path / "other.gguf")
    llm = next(path for path in source.glob("m-*.gguf") if "mmproj" not in path.name)
    accepted("gguf", llm, "--to", "hf", "-o", tmp_path / "out")


def test_links_that_are_usual(corpus: Corpus, tmp_path: Path) -> None:
    """Within the folder; the folder itself; a snapshot in the hub's cache, whose files are links to its blobs."""
    source = corpus.copy("hf", tmp_path)
    (source / "tokenizer.json").rename(source / "the-tokenizer.json")
    (source / "tokenizer.json").symlink_to("the-tokenizer.json")
    (tmp_path / "a-name").symlink_to(source)
    accepted("hf", tmp_path / "a-name", "--to", "official", "-o", tmp_path / "out")
    snapshot = tmp_path / "models--org--m" / "snapshots" / ("a" * 40)
    shutil.copytree(source, snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = blobs / f"{number:064x}"
        blob.write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(Path("..", "..", "blobs", blob.name))
    accepted("hf", snapshot, "--to", "official", "-o", tmp_path / "again")


def test_pointers_of_a_training(tmp_path: Path) -> None:
    """`last_checkpoint` and `latest` say where to look: neither may be read from elsewhere."""
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(TINY / "iter_2.pth", work)
    (work / "last_checkpoint").write_text("iter_2.pth")
    lead_out(work / "last_checkpoint", tmp_path / "home")
    refused(tmp_path, 5, "leaves its folder", args=("inspect", work))
    zero = tmp_path / "zero"
    zero.mkdir()
    lead_out(zero / "latest", tmp_path / "home")
    refused(tmp_path, 5, "leaves its folder", args=("inspect", zero))


def test_the_record_of_a_base(tmp_path: Path) -> None:
    """conversion.json of a base is read, to see whether the adapter is merged into it already."""
    shutil.copytree(TINY, tmp_path / "tiny")
    edit_json(tmp_path / "tiny" / "vit" / "conversion.json", tensors={})
    lead_out(tmp_path / "tiny" / "vit" / "conversion.json", tmp_path / "home")
    args = ("pth", TINY / "iter_2.pth", "--to", "hf", "-o", tmp_path / "out", *bases(tmp_path / "tiny"))
    refused(tmp_path, 5, "leaves its folder", args=args)
