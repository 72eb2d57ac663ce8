"""One output by many: shares, the workers of a cluster and one process give the same bytes, in every layout.

On a disk and in a store (S3, an endpoint of this machine).
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llava_convert
from llava_convert.layouts.info import TARGETS
from tests.properties.test_round_trips import DRAWN, DTYPES, Drawn, template, write

if TYPE_CHECKING:
    from tests.remotes.s3 import Store

__all__ = ["template"]

PLACES = ("disk", "s3")
WORKERS = ("shares", "dask")


@dataclass(frozen=True)
class Asked:
    """A model, what it becomes, and by how many: shares are done in a random order, some of them twice."""

    model: Drawn
    to: str
    place: str
    by: str
    count: int
    limit: int
    full: bool
    digest: bool
    seed: int


ASKED = st.builds(
    Asked,
    model=DRAWN,
    to=st.sampled_from(sorted(TARGETS)),
    place=st.sampled_from(PLACES),
    by=st.sampled_from(WORKERS),
    count=st.integers(1, 6),
    limit=st.sampled_from([4_000, 20_000, 60_000, 10**6]),
    full=st.booleans(),
    digest=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
PLAIN = Asked(
    Drawn("qwen2", 4, 2, 8, 2, 48, False, "bfloat16", "hf", "hf", 1), "hf", "disk", "shares", 3, 20_000, True, True, 1
)


@pytest.fixture(scope="module")
def s3() -> Iterator[Store]:
    from tests.remotes.s3 import account, bucket, served  # moto takes seconds to import

    with served() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in account(endpoint).items():
            patch.setenv(name, value)
        yield bucket(endpoint)


@pytest.fixture(scope="module")
def dask(s3: Store) -> Iterator[str]:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:  # type: ignore[no-untyped-call]
        yield "dask://" + cluster.scheduler_address.removeprefix("tcp://")


def written(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def options_of(asked: Asked, source: Path, tiny: Path) -> dict[str, Any]:
    taken = TARGETS[asked.to].options
    given: dict[str, Any] = {
        "to": asked.to,
        "name": "m",
        "digest": asked.digest,
        "verify": "full" if asked.full else "quick",
    }
    if "max_shard_size" in taken:
        given["max_shard_size"] = asked.limit
    if "outtype" in taken:
        given["outtype"] = f"{DTYPES[asked.model.dtype][1]},q8_0"
    if source.suffix == ".pth":  # its language model was trained whole, which no adapter holds
        given |= {"part": "visual-encoder"}
    return given


def holds(asked: Asked, template: Path, tiny: Path, request: pytest.FixtureRequest) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Of adapters there is one source here: the committed checkpoint, with a LoRA.
        source = tiny / "iter_2.pth" if asked.to == "peft" else write(asked.model, template, folder / "hf")
        if asked.to == "hf":
            source = folder / "official"
            llava_convert.convert(folder / "hf", to="official", out=source, dtype=asked.model.dtype, verify="off")
        given = options_of(asked, source, tiny)
        llava_convert.convert(source, out=folder / "alone", **given)
        wanted = written(folder / "alone")
        s3: Store | None = request.getfixturevalue("s3") if asked.place == "s3" else None
        out: Any = folder / "out" if s3 is None else "s3://models/out"
        if asked.by == "dask":
            llava_convert.convert(source, out=out, executor=request.getfixturevalue("dask"), **given)
        else:
            chance = random.Random(asked.seed)
            numbers = [*range(1, asked.count + 1)]
            numbers += chance.sample(numbers, chance.randint(0, asked.count))
            chance.shuffle(numbers)
            for number in numbers:
                llava_convert.convert(source, out=out, files=f"{number}/{asked.count}", **given)
            llava_convert.convert(source, out=out, finish=True, **given)
        found: Mapping[str, bytes] = written(out) if s3 is None else s3.objects("out")
        if s3 is not None:
            _empty(s3)
        assert sorted(found) == sorted(wanted)
        assert [name for name in wanted if found[name] != wanted[name]] == []
        left = {path.name for path in folder.iterdir()} - {"hf", "official", "alone", "out"}
        assert left == set(), "nothing is left beside it"


def _empty(s3: Store) -> None:
    for name in s3.objects("out"):
        s3.client.delete_object(Bucket="models", Key=f"out/{name}")


EACH = [
    *(pytest.param(to, "shares", "disk", id=to) for to in sorted(TARGETS)),
    *(pytest.param(to, "dask", "s3", id=f"{to}-by-dask-on-s3", marks=pytest.mark.sweep) for to in sorted(TARGETS)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("to", "by", "place"), EACH)
def test_each_layout(to: str, by: str, place: str, template: Path, tiny: Path, request: pytest.FixtureRequest) -> None:
    holds(replace(PLAIN, to=to, by=by, place=place), template, tiny, request)


@pytest.mark.sweep
@given(ASKED)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked(template: Path, tiny: Path, request: pytest.FixtureRequest, asked: Asked) -> None:
    holds(asked, template, tiny, request)
