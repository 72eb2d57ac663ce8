"""An S3 endpoint of this machine (moto's server), and the command beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

from tests.faults.corpus import Ran, shell
from tests.remotes.conftest import HURRIED

KEY, SECRET = "AKIAofTheTests", "secretOfTheTests"


@dataclass
class Store:
    """An S3 bucket, `models`, and the command beside it."""

    client: Any
    env: dict[str, str]

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket="models", Prefix=prefix).get("Contents", [])
        return {
            one["Key"].removeprefix(prefix).lstrip("/"): self.client.get_object(Bucket="models", Key=one["Key"])[
                "Body"
            ].read()
            for one in found
        }

    def put(self, folder: Path, prefix: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder).as_posix()}"
                self.client.put_object(Bucket="models", Key=key, Body=path.read_bytes())

    def run(self, cwd: Path, *arguments: str | Path, code: str = HURRIED, **more: str) -> Ran:
        return shell(*arguments, code=code, environment={**self.env, **more}, cwd=cwd)


def read_back(s3: Store, prefix: str) -> dict[str, bytes]:
    return {n: d for n, d in s3.objects(prefix).items() if n not in ("", "conversion.json", "README.md")}


@contextmanager
def served() -> Iterator[str]:
    """The endpoint's URL."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def account(endpoint: str) -> dict[str, str]:
    """The environment in which clients speak to the endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }


def bucket(endpoint: str) -> Store:
    """The bucket `models` there, empty."""
    keys: dict[str, Any] = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **keys)
    client.create_bucket(Bucket="models")
    boto3.resource("s3", endpoint_url=endpoint, **keys).Bucket("models").objects.all().delete()
    return Store(client, account(endpoint))
