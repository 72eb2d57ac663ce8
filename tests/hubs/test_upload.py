"""upload and --push: what arrives, what is asked, and what is refused before anything is sent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hubs.conftest import Side, arrived, on_disk
from tests.hubs.huggingface import HuggingFace
from tests.hubs.loopback import sha256
from tests.hubs.modelscope import ModelScope
from tests.hubs.runner import Runner

SEQUENCES = {
    "huggingface": [
        "POST /api/repos/create 200",
        "GET /api/models/org/model/tree/main 200",
        "POST /api/validate-yaml 200",
        "POST /api/models/org/model/preupload/main 200",
        "POST /org/model.git/info/lfs/objects/batch 200",
        "PUT /put/OID 200",
        "POST /verify/OID 200",
        "PUT /put/OID 200",
        "POST /verify/OID 200",
        "POST /api/models/org/model/commit/main 200",
        "GET /api/models/org/model/tree/main 200",
    ],
    "modelscope": [
        "POST /api/v1/models 200",
        "GET /api/v1/models/org/model/repo/files 200",
        "POST /api/v1/models 400",  # by its own upload
        "POST /api/v1/repos/models/org/model/info/lfs/objects/batch 200",
        "PUT /put/OID 200",
        "PUT /put/OID 200",
        "POST /api/v1/repos/models/org/model/commit/master 200",
        "GET /api/v1/models/org/model/repo/files 200",
    ],
}


def sequence(side: Side) -> list[str]:
    """The log with the objects' names taken out, and what is sent side by side in an order of its own."""
    found = []
    for line in side.server.lines():
        words = ["/".join("OID" if len(part) == 64 else part for part in word.split("/")) for word in line.split(" ")]
        if " ".join(words) != "POST /api/validate-yaml 200" or "POST /api/validate-yaml 200" not in found:
            found.append(" ".join(words))
    return found


@pytest.mark.parametrize("layout", ["official", "gguf"])
def test_what_arrives(side: Side, runner: Runner, outputs: dict[str, Path], layout: str) -> None:
    folder = outputs[layout]
    found = runner("upload", folder, "org/model", "--hub", side.name, "--json")
    assert found.code == 0, found.said
    assert sorted(sequence(side)) == sorted(SEQUENCES[side.name])
    arrived(side, "org/model", folder)
    for path, data in on_disk(folder).items():
        assert sha256(side.files("org/model")[path]) == hashlib.sha256(data).hexdigest()
    (told,) = found.json()["published"]
    assert (told["hub"], told["repo"], told["revision"]) == (side.name, "org/model", side.branch)
    assert (told["count"], told["bytes"]) == (len(on_disk(folder)), sum(map(len, on_disk(folder).values())))
    assert told["skipped"] == 0 and told["url"].startswith(side.server.url)


def test_in_parts(huggingface: HuggingFace, runner: Runner, outputs: dict[str, Path]) -> None:
    huggingface.part_bytes = 65536
    assert runner("upload", outputs["official"], "org/model").code == 0
    arrived(Side("huggingface", huggingface, "main"), "org/model", outputs["official"])
    parts = [seen.path for seen in huggingface.requests if seen.method == "PUT"]
    assert len(parts) == 4 + 3  # 198,536 and 193,896 bytes


def test_a_card_that_names_its_folder_alone(runner: Runner, copied: Path) -> None:
    told = "the commands in {}/README.md name the folder, not org/model: a conversion with --push names the repository"
    assert told.format(copied) in runner("upload", copied, "org/model").stderr
    card = copied / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(f'"{copied.name}"', '"org/model"'), encoding="utf-8")
    assert "name the folder" not in runner("upload", copied, "org/model").stderr


def test_already_there(side: Side, runner: Runner, outputs: dict[str, Path]) -> None:
    """Asked for, compared, and nothing sent: no commit either."""
    assert runner("upload", outputs["official"], "org/model", "--hub", side.name).code == 0
    side.server.forget()
    found = runner("upload", outputs["official"], "org/model", "--hub", side.name)
    assert found.code == 0 and "11 of them were there already" in found.stdout
    assert [seen.method for seen in side.server.requests] == ["POST", "GET"]


def test_one_file_changed(side: Side, runner: Runner, copied: Path) -> None:
    assert runner("upload", copied, "org/model", "--hub", side.name).code == 0
    (copied / "README.md").write_text("---\nlicense: mit\n---\n# another card\n")
    side.server.forget()
    found = runner("upload", copied, "org/model", "--hub", side.name, "--json")
    assert found.json()["published"][0]["skipped"] == 10 and side.puts() == []
    arrived(side, "org/model", copied)


def test_to_both(huggingface: HuggingFace, modelscope: ModelScope, runner: Runner, outputs: dict[str, Path]) -> None:
    found = runner("upload", outputs["gguf"], "org/model", "--hub", "both")
    assert found.code == 0 and len(found.stdout.splitlines()) == 2
    arrived(Side("huggingface", huggingface, "main"), "org/model", outputs["gguf"])
    arrived(Side("modelscope", modelscope, "master"), "org/model", outputs["gguf"])


def test_caches_and_staging_stay_here(side: Side, runner: Runner, copied: Path, modelscope: ModelScope) -> None:
    """Also ModelScope's record of what it has sent elsewhere: it is not believed."""
    st = (copied / "config.json").stat()
    record = {f"config.json|{st.st_mtime}|{st.st_size}": {"status": "c", "hash": "0" * 64, "size": st.st_size}}
    (copied / ".ms_upload_cache").write_text(json.dumps({"version": 3, "repo_id": "org/model", "files": record}))
    for name in (".cache/huggingface/x.lock", ".git/config", "__pycache__/a.pyc", ".o.partial/model.safetensors"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes(b"x")
    before = on_disk(copied)
    assert runner("upload", copied, "org/model", "--hub", side.name).code == 0
    there = set(side.files("org/model"))
    assert "config.json" in there and not [path for path in there if path.startswith(".") and path != ".gitattributes"]
    assert "__pycache__/a.pyc" not in there
    assert on_disk(copied) == before  # and no cache was added


SECRETS = [".env", ".netrc", "id_rsa", ".ssh/id_ed25519", "sub/server.pem", ".ENV.local", "token"]


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret(side: Side, runner: Runner, copied: Path, secret: str) -> None:
    """It is named and nothing is sent, until --include names it, and it alone."""
    (copied / secret).parent.mkdir(exist_ok=True)
    (copied / secret).write_bytes(b"KEY=TOPSECRET")
    (copied / "other.key").write_bytes(b"KEY=TOPSECRET")
    command = ("upload", copied, "me/out", "--hub", side.name)
    ran = runner(*command)
    assert ran.code == 5 and secret in ran.stderr and "other.key" in ran.stderr, ran.stderr
    assert "--include" in ran.stderr and "me/out" not in side.server.repos and "TOPSECRET" not in ran.said
    ran = runner(*command, "--include", secret)
    assert ran.code == 5 and "other.key" in ran.stderr and "me/out" not in side.server.repos
    ran = runner(*command, "--include", secret, "--include", "other.key")
    assert ran.code == 0, ran.stderr
    assert {secret, "other.key"} <= side.files("me/out").keys()


@pytest.mark.parametrize("name", [".env.example", "id_rsa.pub", "tokenizer.json", "environment.yml", "key.txt"])
def test_what_does_not_look_like_one(huggingface: HuggingFace, runner: Runner, copied: Path, name: str) -> None:
    (copied / name).write_bytes((copied / name).read_bytes() if (copied / name).exists() else b"x")
    assert runner("upload", copied, "me/out").code == 0


def test_include_of_what_is_not_there(huggingface: HuggingFace, runner: Runner, copied: Path) -> None:
    ran = runner("upload", copied, "me/out", "--include", "nothing.key")
    assert ran.code == 2 and "nothing.key" in ran.stderr and "me/out" not in huggingface.repos


def test_private(side: Side, runner: Runner, outputs: dict[str, Path]) -> None:
    assert runner("upload", outputs["gguf"], "org/model", "--hub", side.name, "--private").code == 0
    assert side.server.repos["org/model"].private
    assert runner("upload", outputs["gguf"], "org/open", "--hub", side.name).code == 0
    assert not side.server.repos["org/open"].private
    side.server.forget()
    found = runner("upload", outputs["official"], "org/open", "--hub", side.name, "--private")
    assert found.code == 2 and "is public" in found.stderr
    assert side.puts() == []


def test_revision(huggingface: HuggingFace, runner: Runner, outputs: dict[str, Path]) -> None:
    side = Side("huggingface", huggingface, "main")
    found = runner("upload", outputs["gguf"], "org/model", "--revision", "try/one", "--message", "first try", "--json")
    assert found.code == 0 and found.json()["published"][0]["revision"] == "try/one"
    arrived(side, "org/model", outputs["gguf"], "try/one")
    assert set(side.files("org/model")) == {".gitattributes"}
    repo = huggingface.repos["org/model"]
    assert repo.messages[repo.branches["try/one"]] == "first try"


def test_revision_of_modelscope(modelscope: ModelScope, runner: Runner, outputs: dict[str, Path]) -> None:
    """A branch has to be there: its client makes none."""
    found = runner("upload", outputs["gguf"], "org/model", "--hub", "modelscope", "--revision", "v2")
    assert found.code == 8
    modelscope.repos["org/model"].branches["v2"] = {}
    assert runner("upload", outputs["gguf"], "org/model", "--hub", "modelscope", "--revision", "v2").code == 0
    arrived(Side("modelscope", modelscope, "master"), "org/model", outputs["gguf"], "v2")


def test_create_pr(huggingface: HuggingFace, runner: Runner, outputs: dict[str, Path]) -> None:
    found = runner("upload", outputs["gguf"], "org/model", "--create-pr", "--json")
    assert found.code == 0, found.said
    (told,) = found.json()["published"]
    assert (told["revision"], told["url"]) == ("refs/pr/1", f"{huggingface.url}/org/model/discussions/1")
    side = Side("huggingface", huggingface, "main")
    arrived(side, "org/model", outputs["gguf"], "refs/pr/1")
    assert set(side.files("org/model")) == {".gitattributes"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "owner and its name"),
        (["org/model", "--hub", "github"], "--hub github"),
        (["org/model", "--hub", "modelscope", "--create-pr"], "no pull requests"),
        (["org/model", "--create-pr", "--revision", "v2"], "main branch"),
        (["org/model", "--verify", "quick"], "--verify quick"),
    ],
)
def test_usage(
    runner: Runner, huggingface: HuggingFace, outputs: dict[str, Path], arguments: list[str], message: str
) -> None:
    found = runner("upload", outputs["gguf"], *arguments)
    assert (found.code, found.stdout) == (2, "") and message in found.stderr
    assert huggingface.requests == []


def test_modelscope_is_an_extra(tmp_path: Path, outputs: dict[str, Path], huggingface: HuggingFace) -> None:
    """Without its client: exit 2 with the extra to install, before the other hub is asked for anything."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['modelscope_hub'] = None\n")
    command = [sys.executable, "-m", "llava_convert", "upload", str(outputs["gguf"]), "org/model", "--hub", "both"]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = os.environ | huggingface.env | {"PYTHONPATH": path}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert found.returncode == 2, found.stderr
    assert "pip install 'llava-convert[modelscope]'" in found.stderr
    assert huggingface.requests == []


# --- what has to be proven first


def test_changed_since_it_was_verified(side: Side, runner: Runner, copied: Path) -> None:
    shard = copied / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (copied / "generation_config.json").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"x")
    found = runner("upload", copied, "org/model", "--hub", side.name)
    assert found.code == 7 and side.server.requests == []
    for name in (shard.name, "generation_config.json", "pytorch_model.bin"):
        assert name in found.stderr
    assert runner("upload", copied, "org/model", "--hub", side.name, "--verify", "off").code == 0
    arrived(side, "org/model", copied)


def test_not_verified_in_full(runner: Runner, huggingface: HuggingFace, tiny: Path, copied: Path) -> None:
    """By the record, so it is refused; unless the source is there to compare it with."""
    record = json.loads((copied / "conversion.json").read_text())
    record["verified"] = {"level": "quick"}
    (copied / "conversion.json").write_text(json.dumps(record))
    found = runner("upload", copied, "org/model")
    assert found.code == 2 and "--source" in found.stderr and "--verify off" in found.stderr
    assert huggingface.requests == []
    root = tiny.parents[1]
    found = runner("upload", copied, "org/model", "--source", tiny / "iter_2.pth", cwd=root)
    assert found.code == 0, found.said
    shard = copied / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert runner("upload", copied, "org/model", "--source", tiny / "iter_2.pth", cwd=root).code == 7


def test_of_another_program(runner: Runner, huggingface: HuggingFace, copied: Path) -> None:
    (copied / "conversion.json").unlink()
    found = runner("upload", copied, "org/model")
    assert found.code == 0 and "nothing to compare it with" in found.stderr
    arrived(Side("huggingface", huggingface, "main"), "org/model", copied)
    shutil.copy(copied / "tokenizer.json", copied / "model-00002-of-00002.safetensors")
    huggingface.forget()
    found = runner("upload", copied, "org/model")
    assert found.code == 3 and huggingface.requests == []


def test_not_a_folder(runner: Runner, tmp_path: Path, outputs: dict[str, Path]) -> None:
    for wrong in (tmp_path / "absent", outputs["gguf"] / "tiny-f16.gguf", tmp_path):
        found = runner("upload", wrong, "org/model")
        assert found.code == 3, found.said


@pytest.mark.parametrize("front", ["license: [mit", "- a list", "a: b: c"])
def test_a_card_that_hubs_refuse(runner: Runner, huggingface: HuggingFace, copied: Path, front: str) -> None:
    (copied / "README.md").write_text(f"---\n{front}\n---\n# card\n")
    found = runner("upload", copied, "org/model")
    assert found.code == 3 and "README.md" in found.stderr
    assert huggingface.requests == []


# --- --push


def test_push(side: Side, runner: Runner, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    root = tiny.parents[1]
    words = ["pth", tiny / "iter_2.pth", "--to", "xtuner", "-o", out, "--push", "org/model", "--hub", side.name]
    assert runner(*words, "--dry-run", cwd=root).code == 0 and side.server.requests == []
    found = runner(*words, "--private", "--json", cwd=root)
    assert found.code == 0, found.said
    assert found.json()["verified"] == "full" and found.json()["published"][0]["count"] == len(on_disk(out))
    arrived(side, "org/model", out)
    assert side.server.repos["org/model"].private


def test_push_is_checked_before_the_conversion(runner: Runner, tiny: Path, tmp_path: Path) -> None:
    words = ["pth", tiny / "iter_2.pth", "--to", "xtuner", "-o", tmp_path / "o"]
    for more, message in (
        (["--push", "model"], "owner and its name"),
        (["--push", "org/model", "--verify", "quick"], "verified in full"),
        (["--push", "org/model", "--hub", "modelscope", "--create-pr"], "no pull requests"),
        (["--private"], "--push"),
    ):
        found = runner(*words, *more, cwd=tiny.parents[1])
        assert found.code == 2 and message in found.stderr, found.said
    assert not (tmp_path / "o").exists()


def test_push_unverified(runner: Runner, huggingface: HuggingFace, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    words = ["pth", tiny / "iter_2.pth", "--to", "xtuner", "-o", out, "--push", "org/model", "--verify", "off"]
    found = runner(*words, cwd=tiny.parents[1])
    assert found.code == 0 and "published unverified" in found.stderr
    arrived(Side("huggingface", huggingface, "main"), "org/model", out)
