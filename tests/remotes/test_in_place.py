"""Models on hubs as sources, read in place: the same output as from a local folder, few bytes, no copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import llava_convert
from benchmarks.make import make_header_only, make_official
from tests.faults.corpus import shell, tree
from tests.hubs.huggingface import HuggingFace
from tests.hubs.loopback import Request, Status
from tests.hubs.modelscope import ModelScope
from tests.remotes.conftest import HURRIED, Command, weights_in

MB = 1_000_000


@pytest.mark.parametrize(
    ("scheme", "layout", "to"),
    [
        ("hf", "xtuner", "official"), ("hf", "official", "hf"), ("hf", "hf", "gguf"), ("hf", "gguf", "hf"),
        ("hf", "pth", "official"), ("ms", "official", "gguf"), ("ms", "pth", "hf"),
    ],
)  # fmt: skip
def test_every_layout_is_read_in_place(
    command: Command,
    scheme: str,
    layout: str,
    to: str,
    layouts: dict[str, Path],
    tiny: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    hub = request.getfixturevalue(scheme)
    folder = tiny if layout == "pth" else layouts[layout]
    hub.add("org/tiny", folder)
    source, more = f"{scheme}://org/tiny", ["--llm-id", "org/tiny-llm", "--visual-encoder-id", "org/tiny-vit"]
    if layout in ("xtuner", "pth"):
        more += ["--visual-encoder", str(tiny / "vit")]
    if layout == "pth":
        source, more = f"{source}/iter_2.pth", [*more, "--llm", str(tiny / "llm")]
    ran = command("convert", source, "--to", to, "-o", "remote", "--name", "tiny", *more)
    assert ran.code == 0, ran.stderr
    local = folder / "iter_2.pth" if layout == "pth" else folder
    there = command("convert", local, "--to", to, "-o", "local", "--name", "tiny", *more)
    assert there.code == 0, there.stderr
    assert weights_in(tmp_path / "remote") == weights_in(tmp_path / "local")
    assert str(tmp_path) not in (tmp_path / "remote" / "conversion.json").read_text()
    recorded = json.loads((tmp_path / "remote" / "conversion.json").read_text())["sources"][0]
    assert recorded["repo"] == "org/tiny"
    assert (recorded.get("commit") == hub.repos["org/tiny"].branches["main"]) if scheme == "hf" else True


def test_inspect_of_an_8b_model_costs_kilobytes(
    command: Command, hf: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llava").mkdir()
    make_header_only(tmp_path / "llava")
    # Its 16 GB are a hole in the file; to hash them is nothing the test is about.
    monkeypatch.setattr("tests.hubs.huggingface.sha256", lambda blob: f"{abs(hash(blob)):064x}")
    hf.add("org/llava-8b", tmp_path / "llava")
    ran = command("inspect", "hf://org/llava-8b", "--json")
    assert ran.code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["source"], found["layout"]) == ("hf://org/llava-8b", "official")
    assert sum(part["bytes"] for part in found["parts"].values()) > 16 * 10**9
    assert [to for to, target in found["targets"].items() if not target["possible"]] == ["peft"]  # it has no adapter
    sent = sum(seen.sent for seen in hf.requests)
    assert sent < 400_000 and len(hf.requests) <= 12, (sent, hf.lines())
    assert found["bytes_fetched"] == sent - sum(seen.sent for seen in hf.requests if seen.path.startswith("/api/"))
    told = command("inspect", "hf://org/llava-8b").stderr
    assert f"fetched {found['bytes_fetched'] / 1000:.1f} kB in 6 requests" in told


def test_no_byte_twice_and_no_copy(command: Command, hf: HuggingFace, tmp_path: Path) -> None:
    """A conversion fetches each weight once, and keeps none beside its output."""
    (tmp_path / "llava").mkdir()
    make_official(tmp_path / "llava", 40 * MB, "F16")
    hf.add("org/llava", tmp_path / "llava")
    stored = sum(p.stat().st_size for p in (tmp_path / "llava").glob("*.safetensors"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    most = 0

    def look(number: int, request: Request) -> None:
        nonlocal most
        most = max(most, sum(p.stat().st_blocks * 512 for p in temporary.rglob("*") if p.is_file()))

    hf.fault = look
    ran = command("convert", "org/llava", "--to", "gguf", "-o", "out", "--name", "x",
        "--visual-encoder", tmp_path / "llava" / "tower", TMPDIR=str(temporary),
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    weights = [seen for seen in hf.requests if "/cdn/" in seen.path]
    assert stored <= sum(seen.sent for seen in weights) < 1.1 * stored, (
        "headers and neighbours of small tensors come on top"
    )
    assert len(weights) < 200, len(weights)
    assert most < 2 * MB and not list(temporary.iterdir()), "placeholders, config and tokenizer; and nothing at the end"


def test_an_export_of_the_language_model_does_not_fetch_the_tower(
    command: Command, hf: HuggingFace, tmp_path: Path
) -> None:
    (tmp_path / "llava").mkdir()
    make_official(tmp_path / "llava", 80 * MB, "F16")
    hf.add("org/llava", tmp_path / "llava")
    ran = command("official", "hf://org/llava", "--to", "hf", "--part", "llm", "-o", "out", "--json")
    assert ran.code == 0, ran.stderr
    written = json.loads(ran.stdout)["bytes"]
    stored = sum(p.stat().st_size for p in (tmp_path / "llava").glob("*.safetensors"))
    sent = sum(seen.sent for seen in hf.requests if "/cdn/" in seen.path)
    assert written < 0.95 * stored, "the tower and the projector are worth leaving out"
    assert sent < written + 1.5 * MB, (sent, written, stored)


def test_bases_are_read_in_place_too(command: Command, hf: HuggingFace, tiny: Path, tmp_path: Path) -> None:
    hf.add("org/tiny-vit", tiny / "vit")
    hf.add("org/tiny-llm", tiny / "llm")
    more = ["--llm", "org/tiny-llm", "--visual-encoder", "hf://org/tiny-vit"]
    ran = command("pth", tiny / "iter_2.pth", "--to", "official", "-o", "out", *more)
    assert ran.code == 0, ran.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["_name_or_path"], config["mm_vision_tower"]) == ("org/tiny-llm", "org/tiny-vit")
    roles = {
        s["role"]: s.get("repo") for s in json.loads((tmp_path / "out" / "conversion.json").read_text())["sources"]
    }
    assert roles["visual-encoder"] == "org/tiny-vit"
    assert not (hf.home / "hub").exists(), "nothing went to the cache"
    llava_convert.convert(tiny / "iter_2.pth", to="official", out=tmp_path / "local")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_cache_puts_it_into_the_clients_cache(
    command: Command, scheme: str, layouts: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    hub = request.getfixturevalue(scheme)
    hub.add("org/tiny", layouts["official"])
    address = f"{scheme}://org/tiny"
    ran = command("convert", address, "--to", "hf", "-o", "out", "--cache")
    assert ran.code == 0, ran.stderr
    assert not any(seen.range and seen.range != "bytes=0-" for seen in hub.requests), "whole files"
    hub.forget()
    again = command("convert", address, "--to", "hf", "-o", "again", HF_HUB_OFFLINE="1")
    assert again.code == 0, again.stderr
    if scheme == "hf":
        assert not hub.requests, "what the cache holds whole needs no network"
    assert weights_in(tmp_path / "out") == weights_in(tmp_path / "again")


def test_the_default_name_is_the_models(
    command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path
) -> None:
    hf.add("org/tiny-llava", layouts["official"])
    assert command("convert", "org/tiny-llava", "--to", "hf").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-llava_hf"]


def test_revisions_and_folders_inside(
    command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path
) -> None:
    nested = tmp_path / "nested"
    shutil.copytree(layouts["hf"], nested / "models" / "v2")
    hf.add("org/many", {"README.md": b"# nothing\n"})
    hf.add("org/many", nested, revision="refs/pr/3")
    asked = [
        ("hf://org/many@refs/pr/3/models/v2", 0, "hf"),
        ("hf://org/many/models/v2", 3, "hf://org/many has no models/v2"),
        ("hf://org/many@absent/models/v2", 8, "the revision absent does not exist"),
        ("hf://org", 2, "hf://ORG/NAME"),
    ]
    for address, code, said in asked:
        ran = command("inspect", address)
        assert ran.code == code and said in ran.stdout + ran.stderr, (address, ran.stderr)


def test_verify_against_what_is_on_the_hub(
    command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path
) -> None:
    hf.add("org/tiny", layouts["hf"])
    same = command("verify", layouts["official"], "hf://org/tiny")
    assert same.code == 0 and "the same: 80 tensors" in same.stdout, same.stderr
    other = tmp_path / "other"
    shutil.copytree(layouts["hf"], other)
    with (other / "model.safetensors").open("r+b") as stream:
        stream.seek(-2, 2)
        stream.write(b"\x00\x3c")
    hf.add("org/other", other)
    ran = command("verify", layouts["official"], "hf://org/other")
    assert ran.code == 7, ran.stderr


def test_a_private_model_needs_its_token(
    command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path
) -> None:
    hf.add("org/secret", layouts["hf"], private=True)
    assert command("inspect", "org/secret").code == 0
    ran = command("inspect", "org/secret", HF_TOKEN="")
    assert ran.code == 8 and len(ran.errors) == 1
    assert "there is no org/secret here, and hf://org/secret: the model does not exist, or it is private" in ran.stderr


def test_a_name_that_leads_out_is_refused(
    command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path
) -> None:
    files = {p.name: p for p in layouts["hf"].iterdir()}
    hf.add("org/evil", {**files, "../../escaped": b"x"})
    ran = command("inspect", "hf://org/evil", TMPDIR=str(tmp_path))
    assert ran.code == 5 and "../../escaped is not a name for a file inside a folder" in ran.stderr
    assert tree(tmp_path) == {}


def test_a_mirror_with_a_part_of_the_hubs_calls(
    command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path
) -> None:
    """Only the tree and the files: no description of the model, no HEAD."""
    hf.add("org/tiny", layouts["official"])
    hf.fault = lambda number, request: (
        Status(404, {}, b"") if request.path == "/api/models/org/tiny" or request.method == "HEAD" else None
    )
    ran = command("convert", "hf://org/tiny", "--to", "hf", "-o", "out")
    assert ran.code == 0, ran.stderr
    assert llava_convert.verify(layouts["official"], tmp_path / "out").same


def test_the_address_that_the_hub_gave_expires(
    command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path
) -> None:
    hf.add("org/tiny", layouts["official"])
    refused = 0

    def expire(number: int, request: Request) -> Status | None:
        nonlocal refused
        if "/cdn/" in request.path and refused < 3 and "bytes=0-" not in request.headers.get("Range", ""):
            refused += 1
            return Status(403)
        return None

    hf.fault = expire
    ran = command("convert", "hf://org/tiny", "--to", "hf", "-o", "out")
    assert ran.code == 0 and refused == 3, ran.stderr
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert llava_convert.verify(layouts["official"], tmp_path / "out").same


def test_a_killed_run_is_resumed(command: Command, hf: HuggingFace, layouts: dict[str, Path], tmp_path: Path) -> None:
    """By another process, whose placeholders lie elsewhere; and not when the branch has moved meanwhile."""
    hf.add("org/tiny", layouts["official"])
    killed = HURRIED.replace(
        "from llava_convert.cli",
        "import os\n"
        "from llava_convert.storage.output.staging import Staging\n"
        "Staging.write_bytes = lambda self, name, data: os.kill(os.getpid(), 9)\n"
        "from llava_convert.cli",
    )
    arguments = ["convert", "hf://org/tiny", "--to", "hf", "-o", "out"]
    assert shell(*arguments, code=killed, environment=hf.env, cwd=tmp_path).code == -9
    hf.forget()
    ran = command(*arguments, "--resume")
    assert ran.code == 0 and "resuming: 2 finished files kept" in ran.stderr, ran.stderr
    assert all(seen.range == "bytes=0-65535" for seen in hf.requests if "/cdn/" in seen.path), "headers alone"
    assert llava_convert.verify(layouts["official"], tmp_path / "out").same
    shutil.rmtree(tmp_path / "out")
    assert shell(*arguments, code=killed, environment=hf.env, cwd=tmp_path).code == -9
    hf.add("org/tiny", {p.name: p for p in layouts["official"].iterdir()} | {"NEWS": b"another commit"})
    ran = command(*arguments, "--resume")
    assert ran.code == 0 and "it belongs to another plan" in ran.stderr, ran.stderr


def test_modelscope_without_its_client(command: Command, tmp_path: Path, hf: HuggingFace) -> None:
    (tmp_path / "hidden" / "modelscope").mkdir(parents=True)
    (tmp_path / "hidden" / "modelscope" / "__init__.py").write_text("raise ImportError")
    root = Path(llava_convert.__file__).resolve().parents[1]
    ran = command("inspect", "ms://org/tiny", PYTHONPATH=f"{tmp_path / 'hidden'}:{root}")
    assert ran.code == 2 and "pip install 'llava-convert[modelscope]'" in ran.stderr


def test_modelscope_that_changes_meanwhile(
    command: Command, ms: ModelScope, layouts: dict[str, Path], tmp_path: Path
) -> None:
    """It has no commits to hold on to: the content's sha256 is asked for again at the end."""
    ms.add("org/tiny", layouts["official"])
    changed = tmp_path / "changed"
    shutil.copytree(layouts["official"], changed)
    with next(changed.glob("model-00001*")).open("r+b") as stream:
        stream.seek(-2, 2)
        stream.write(b"\x00\x3c")
    seen = 0

    def exchange(number: int, request: Request) -> None:
        nonlocal seen
        if "bytes=0-" not in request.headers.get("Range", "bytes=0-"):
            seen += 1
            if seen == 2:
                ms.add("org/tiny", changed)

    ms.fault = exchange
    ran = command("convert", "ms://org/tiny", "--to", "hf", "-o", "out")
    assert ran.code == 3 and "changed while it was read" in ran.stderr, ran.stderr
    assert not (tmp_path / "out").exists()
