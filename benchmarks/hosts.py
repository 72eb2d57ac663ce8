"""`python -m benchmarks.hosts`: two workers as two hosts, each in a network of its own, through a store on a third.

Needs root and Linux (`ip netns`). Says of each way of sharing how long it took, how many requests the store had, what
went over each host's network, and whether the bytes are those of one process.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import EndpointConnectionError
from rich.console import Console
from rich.table import Table

from benchmarks.make import made, make_official

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"AWS_ACCESS_KEY_ID": "hosts", "AWS_SECRET_ACCESS_KEY": "hosts", "AWS_DEFAULT_REGION": "us-east-1"}
LINE = re.compile(r'"(GET|PUT|HEAD|POST|DELETE) ')


@dataclass
class Host:
    """A network namespace with one link to the bridge; traffic is what its link counted."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def bytes(self) -> dict[str, int]:
        read = subprocess.run(self.command("cat", "/proc/net/dev"), check=True, capture_output=True, text=True)
        line = next(line for line in read.stdout.splitlines() if "eth0" in line).split(":")[1].split()
        return {"in": int(line[0]), "out": int(line[8])}


@contextlib.contextmanager
def network(count: int) -> Iterator[tuple[str, list[Host]]]:
    """A bridge with an address of this machine, and hosts on it."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    hosts = [Host(f"lc{number}", f"10.213.7.{number + 1}") for number in range(1, count + 1)]
    with contextlib.ExitStack() as undo:
        ip("link", "add", "lcbr", "type", "bridge")
        undo.callback(ip, "link", "del", "lcbr")
        ip("addr", "add", "10.213.7.1/24", "dev", "lcbr")
        ip("link", "set", "lcbr", "up")
        for host in hosts:
            ip("netns", "add", host.name)
            undo.callback(ip, "netns", "del", host.name)
            ip("link", "add", f"{host.name}a", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("link", "set", f"{host.name}a", "master", "lcbr", "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                ip("-n", host.name, "link", "set", link, "up")
        yield "10.213.7.1", hosts


@dataclass
class Store:
    """moto's S3 endpoint in a process of its own, with one bucket, `models`; its log counts requests."""

    url: str
    log: Path

    @property
    def requests(self) -> int:
        return len(LINE.findall(self.log.read_text(errors="replace")))

    @property
    def client(self) -> Any:
        secret, key = KEYS["AWS_SECRET_ACCESS_KEY"], KEYS["AWS_ACCESS_KEY_ID"]
        place = {"endpoint_url": self.url, "region_name": KEYS["AWS_DEFAULT_REGION"]}
        return boto3.client("s3", aws_access_key_id=key, aws_secret_access_key=secret, **place)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **KEYS, "AWS_ENDPOINT_URL": self.url, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def put(self, folder: Path, prefix: str) -> None:
        for path in sorted(one for one in folder.iterdir() if one.is_file()):
            self.client.upload_file(str(path), "models", f"{prefix}/{path.name}")

    def digests(self, prefix: str) -> dict[str, str]:
        """The sha256 of each object but card and record, which name the place."""
        found = {}
        for one in self.client.list_objects_v2(Bucket="models", Prefix=f"{prefix}/")["Contents"]:
            name = one["Key"].removeprefix(f"{prefix}/")
            if name not in ("README.md", "conversion.json"):
                body = self.client.get_object(Bucket="models", Key=one["Key"])["Body"]
                digest = hashlib.sha256()
                for piece in body.iter_chunks(1 << 20):
                    digest.update(piece)
                found[name] = digest.hexdigest()
        return found


@contextlib.contextmanager
def store(address: str, folder: Path) -> Iterator[Store]:
    found = Store(f"http://{address}:5599", folder / "store.log")
    with found.log.open("w") as out:
        words = [sys.executable, "-m", "moto.server", "-H", address, "-p", "5599"]
        server = subprocess.Popen(words, stdout=out, stderr=out)
    try:
        for _ in range(100):
            with contextlib.suppress(EndpointConnectionError):
                found.client.create_bucket(Bucket="models")
                break
            time.sleep(0.2)
        yield found
    finally:
        server.kill()
        server.wait()


def convert(tower: Path, target: str, *more: str) -> list[str]:
    """The command from the store to the store, for models named alike wherever they go."""
    words = [
        sys.executable,
        "-m",
        "llava_convert",
        "convert",
        "s3://models/in",
        "--to",
        "hf",
        "-o",
        f"s3://models/{target}",
    ]
    return [*words, "--name", "model", "--max-shard-size", "50MB", "--visual-encoder", str(tower), *more]


@dataclass
class Way:
    """One way of sharing, as it went."""

    name: str
    seconds: float
    requests: int
    traffic: list[dict[str, int]]
    same: bool


def measured(name: str, store: Store, hosts: list[Host], target: str, wanted: dict[str, str], run: Any) -> Way:
    before, requests, started = [host.bytes() for host in hosts], store.requests, time.monotonic()
    run()
    seconds, asked = time.monotonic() - started, store.requests - requests
    after = [host.bytes() for host in hosts]
    traffic = [{way: late[way] - early[way] for way in late} for early, late in zip(before, after, strict=True)]
    return Way(name, seconds, asked, traffic, not wanted or store.digests(target) == wanted)


def together(commands: list[list[str]], environment: dict[str, str]) -> None:
    running = [subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) for words in commands]
    if any(process.wait() for process in running):
        raise SystemExit("a share failed")


def ways(store: Store, address: str, hosts: list[Host], folder: Path, tower: Path) -> Iterator[Way]:
    environment = store.environment
    one = measured(
        "one process on one host",
        store,
        hosts,
        "one",
        {},
        lambda: together([hosts[0].command(*convert(tower, "one"))], environment),
    )
    yield one
    wanted = store.digests("one")

    def shares() -> None:
        count = len(hosts)
        together(
            [host.command(*convert(tower, "shares", "--files", f"{i}/{count}")) for i, host in enumerate(hosts, 1)],
            environment,
        )
        together([hosts[0].command(*convert(tower, "shares", "--finish"))], environment)

    yield measured(f"--files, {len(hosts)} hosts, then --finish", store, hosts, "shares", wanted, shares)
    program = "import sys; from distributed.cli import dask_{0}; dask_{0}.main(sys.argv[1:])"
    scheduler = [
        sys.executable,
        "-c",
        program.format("scheduler"),
        "--host",
        address,
        "--port",
        "5600",
        "--no-dashboard",
    ]
    worker = [sys.executable, "-c", program.format("worker"), f"tcp://{address}:5600", "--nthreads", "1", "--no-nanny"]
    quiet: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    cluster = [subprocess.Popen(scheduler, **quiet)]
    cluster += [subprocess.Popen(host.command(*worker), **quiet, cwd=folder) for host in hosts]
    try:
        time.sleep(5)
        words = convert(tower, "dask", "--executor", f"dask://{address}:5600")
        yield measured(
            f"Dask, {len(hosts)} hosts", store, hosts, "dask", wanted, lambda: together([words], environment)
        )
    finally:
        for process in cluster:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.hosts", description=__doc__)
    parser.add_argument("--size", type=float, default=0.5, help="GB of the model")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="where the model is made and kept")
    chosen = parser.parse_args()
    source = made(chosen.cache.absolute() / f"official-{chosen.size}", make_official, int(chosen.size * 1e9), "BF16")
    table = Table("way", "seconds", "requests", "GB in, by host", "GB out, by host", "the bytes of one process")
    with (
        tempfile.TemporaryDirectory() as folder,
        network(chosen.hosts) as (address, hosts),
        store(address, Path(folder)) as there,
    ):
        there.put(source, "in")
        for way in ways(there, address, hosts, Path(folder), source / "tower"):
            took = [", ".join(f"{one[side] / 1e9:.3f}" for one in way.traffic) for side in ("in", "out")]
            table.add_row(way.name, f"{way.seconds:.1f}", str(way.requests), *took, "yes" if way.same else "NO")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
