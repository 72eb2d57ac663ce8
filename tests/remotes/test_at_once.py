"""Conversions at once in one process: each reads, names and counts what is its own, and one that fails fails alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.corpus import shell
from tests.hubs.huggingface import HuggingFace
from tests.remotes.conftest import weights_in

# Each job is a name, a source and keywords; all threads begin together, as often as there are rounds. Printed: for each
# round and job the report's own words, or the error's; then what is left in the temporary folder.
TOGETHER = """
import json, os, shutil, sys, tempfile, threading
from pathlib import Path
import llava_convert

jobs, rounds = json.loads(sys.argv[1]), int(sys.argv[2])
together, said = threading.Barrier(len(jobs)), []

def run(number, name, source, more):
    together.wait()
    try:
        found = llava_convert.convert(source, to="hf", out=f"{number}-{name}", name="tiny", **more)
        found = {"source": str(found.source), "fetched": found.fetched.bytes, "texts": [*found.notes, *found.warnings]}
    except llava_convert.ConvertError as problem:
        found = {"error": str(problem), "hint": problem.hint, "code": problem.exit_code}
    said.append({"round": number, "job": name, **found})

for number in range(rounds):
    threads = [threading.Thread(target=run, args=(number, *job)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print(json.dumps({"said": said, "left": os.listdir(tempfile.gettempdir())}))
"""
IDS = {"llm_id": "org/tiny-llm", "visual_encoder_id": "org/tiny-vit"}
ROUNDS = 4


@pytest.fixture
def hub(hf: HuggingFace, layouts: dict[str, Path]) -> HuggingFace:
    hf.add("org/tiny", layouts["official"])
    hf.add("org/other", layouts["xtuner"])
    whole = {path.name: path.read_bytes() for path in layouts["official"].iterdir() if path.is_file()}
    shard = next(name for name in sorted(whole) if name.endswith(".safetensors"))
    hf.add("org/cut", whole | {shard: whole[shard][:-100]})
    return hf


def test_each_has_its_own(hub: HuggingFace, layouts: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    """Two of the hub, one of them with a base of this machine, one local, and one whose weights are cut short."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    jobs = [
        ("local", str(layouts["official"]), IDS),
        ("remote", "hf://org/tiny", IDS),
        ("other", "hf://org/other", {**IDS, "visual_encoder": str(tiny / "vit")}),
        ("cut", "hf://org/cut", IDS),
    ]
    environment = {**hub.env, "TMPDIR": str(temporary)}
    alone = {
        job[0]: shell(json.dumps([job]), "1", code=TOGETHER, environment=environment, cwd=_folder(tmp_path, job[0]))
        for job in jobs
    }
    expected = {name: json.loads(ran.stdout)["said"][0] for name, ran in alone.items()}
    ran = shell(json.dumps(jobs), str(ROUNDS), code=TOGETHER, environment=environment, cwd=_folder(tmp_path, "all"))
    assert ran.code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found["said"]) == ROUNDS * len(jobs)
    for one in found["said"]:
        assert one | {"round": 0} == expected[one["job"]], "as when it is alone in its process"
        if one["job"] != "cut":
            together = tmp_path / "all" / f"{one['round']}-{one['job']}"
            assert weights_in(together) == weights_in(tmp_path / one["job"] / f"0-{one['job']}")
    assert (expected["local"]["source"], expected["local"]["fetched"]) == (str(layouts["official"]), 0)
    assert expected["remote"]["source"] == "hf://org/tiny" and expected["remote"]["fetched"] > 100_000
    assert expected["cut"]["code"] == 3 and expected["cut"]["error"].startswith("hf://org/cut/model-0")
    assert not any(str(temporary) in json.dumps(one) for one in found["said"])
    assert found["left"] == [], "what was mounted is gone"


def test_a_folder_is_called_by_its_address_only_where_it_was_reached_by_it(
    hub: HuggingFace, tmp_path: Path, tiny: Path
) -> None:
    """The cache's folder of a model, read by its address in one thread and by its path in another."""
    download = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download('org/tiny'))"
    snapshot = shell(code=download, environment=hub.env).stdout.strip()
    jobs = [("address", "hf://org/tiny", IDS), ("path", snapshot, IDS)]
    ran = shell(json.dumps(jobs), str(ROUNDS), code=TOGETHER, environment=hub.env, cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    sources = {(one["job"], one["source"]) for one in json.loads(ran.stdout)["said"]}
    assert sources == {("address", "hf://org/tiny"), ("path", snapshot)}


def _folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder
