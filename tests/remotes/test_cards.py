"""The card of what was read from a hub: it names that model, and passes on what its card says."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from tests.hubs.huggingface import HuggingFace
from tests.hubs.modelscope import ModelScope
from tests.remotes.conftest import Command


def test_what_the_hubs_card_says(
    command: Command, hf: HuggingFace, ms: ModelScope, layouts: dict[str, Path], tmp_path: Path
) -> None:
    """An id of ModelScope is none of the Hub's, so that the base models are named there."""
    source = tmp_path / "source"
    source.mkdir()
    for file in layouts["official"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE\n---\n# Ours\n")
    for hub, address, bases, link in (
        (hf, "hf://org/ours", ["org/ours"], "https://huggingface.co/org/ours/blob/main/LICENSE"),
        (ms, "ms://org/ours", ["org/tiny-llm", "org/tiny-vit"], None),
    ):
        hub.add("org/ours", source)
        out = f"from-{address[:2]}"
        ran = command("convert", address, "--to", "hf", "-o", out)
        assert ran.code == 0, ran.stderr
        data = ModelCard((tmp_path / out / "README.md").read_text()).data
        assert (data.base_model, data.license, data.license_name) == (bases, "other", "ours")
        assert data.to_dict().get("license_link") == link
