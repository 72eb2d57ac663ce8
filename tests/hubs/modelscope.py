"""ModelScope on this machine, for the real `modelscope` and `modelscope_hub`. Sequences measured with 1.40 and 0.5.

    with ModelScope() as hub:
        hub.add("org/model", folder)
        subprocess.run(command, env=os.environ | hub.env)

Large files are sent by redirection to another host name, as the real one does with its object storage; it refuses
an Authorization header.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from tests.hubs.loopback import Answer, Blob, Loopback, Request, as_json, folder_files, read, sha256, size_of

LFS_BYTES = 64 << 10  # modelscope_hub's own threshold
ALREADY_EXISTS = 10010101001  # modelscope_hub/errors.py: "China site: model already exists"
PRIVATE = 1


@dataclass
class Repo:
    """Branches hold files; `messages` are those of the commits, oldest first."""

    private: bool = False
    branches: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "master") -> dict[str, Blob]:
        return self.branches[revision]


class ModelScope(Loopback):
    """`repos` is what it holds, `objects` the contents by sha256 that were sent through LFS."""

    def __init__(self, token: str = "ms-0123abcd-good-token-of-the-tests") -> None:
        super().__init__()
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, Blob] = {}
        self.cdn = True
        self._cdn_url = f"http://localhost:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        return {
            "MODELSCOPE_ENDPOINT": self.url,
            "MODELSCOPE_DOMAIN": self.url,  # what modelscope itself reads, and modelscope_hub before it had the other
            "MODELSCOPE_API_TOKEN": self.token,
            "MODELSCOPE_HOME": str(self.home),
            "MODELSCOPE_CACHE": str(self.home / "cache"),
            "MODELSCOPE_CREDENTIALS_PATH": str(self.home / "credentials"),
            "no_proxy": "127.0.0.1,localhost",
        }

    def add(
        self, repo_id: str, files: Path | Mapping[str, Blob], *, revision: str = "master", private: bool = False
    ) -> None:
        """Put a folder (served from where it lies) or files on the hub."""
        found = folder_files(files) if isinstance(files, Path) else dict(files)
        self.objects |= {sha256(blob): blob for blob in found.values() if size_of(blob) > LFS_BYTES}
        self.repos.setdefault(repo_id, Repo(private)).branches[revision] = found

    # --- dispatch

    def answer(self, request: Request) -> Answer:
        for method, pattern, action in _ROUTES:
            if method in (request.method, "ANY") and (match := re.fullmatch(pattern, request.quoted)):
                return action(self, request, **{k: unquote(v) for k, v in match.groupdict("").items()})
        return refusal(404, f"no route for {request.method} {request.path}")

    def _open(self, request: Request, repo: str, *, write: bool = False) -> Repo | Answer:
        found = self.repos.get(repo)
        if request.token not in (None, self.token) or (request.token is None and write):
            return refusal(401, "Unauthorized: the access token is invalid or expired", 10010205001)
        if found is None or (found.private and request.token is None):
            return refusal(404, f"model {repo} does not exist", 10010205001)
        return found

    def _files(self, request: Request, repo: str, rev: str, *, write: bool = False) -> dict[str, Blob] | Answer:
        found = self._open(request, repo, write=write)
        if isinstance(found, Answer):
            return found
        files = found.branches.get(rev)
        return files if files is not None else refusal(404, f"revision {rev} does not exist", 10010205003)

    # --- reading

    def info(self, request: Request, repo: str) -> Answer:
        found = self._open(request, repo)
        if isinstance(found, Answer):
            return found
        owner, _, name = repo.partition("/")
        return ok({"Id": 1, "Path": owner, "Name": name, "Visibility": PRIVATE if found.private else 5})

    def open_info(self, request: Request, repo: str) -> Answer:
        found = self._open(request, repo)
        return found if isinstance(found, Answer) else as_json({"data": {"id": repo, "private": found.private}})

    def revisions(self, request: Request, repo: str) -> Answer:
        found = self._open(request, repo)
        if isinstance(found, Answer):
            return found
        branches = [{"Revision": name, "CreatedAt": 1} for name in found.branches]
        return ok({"RevisionMap": {"Branches": branches, "Tags": []}})

    def listing(self, request: Request, repo: str) -> Answer:
        revision = request.query.get("Revision") or "master"
        files = self._files(request, repo, revision)
        if isinstance(files, Answer):
            return files
        root = request.query.get("Root", "").strip("/")
        prefix = f"{root}/" if root else ""
        folders = {"/".join(p.split("/")[:n]) for p in files for n in range(1, p.count("/") + 1)}
        entries = [{"Path": f, "Name": f.rpartition("/")[2], "Size": 0, "Sha256": "", "Type": "tree"} for f in folders]
        for path, blob in files.items():
            entries.append(
                {
                    "Path": path,
                    "Name": path.rpartition("/")[2],
                    "Size": size_of(blob),
                    "Sha256": sha256(blob),
                    "Type": "blob",
                    "IsLFS": size_of(blob) > LFS_BYTES,
                    "Revision": _revision_of(files),
                }
            )
        entries = [e for e in entries if str(e["Path"]).startswith(prefix)]
        if request.query.get("Recursive", "").lower() != "true":
            entries = [e for e in entries if "/" not in str(e["Path"]).removeprefix(prefix)]
        return ok({"Files": sorted(entries, key=lambda e: str(e["Path"]))})

    def download(self, request: Request, repo: str) -> Answer:
        files = self._files(request, repo, request.query.get("Revision") or "master")
        if isinstance(files, Answer):
            return files
        blob = files.get(request.query.get("FilePath", ""))
        if blob is None:
            return refusal(404, f"file {request.query.get('FilePath')} does not exist", 10010205004)
        oid = sha256(blob)
        headers = {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
        if self.cdn and size_of(blob) > LFS_BYTES:
            where = {"Location": f"{self._cdn_url}/oss/{oid}?signature=of-the-tests", "X-Linked-ETag": f'"{oid}"'}
            return Answer(302, b"", headers | where)
        return Answer(200, blob, headers, ranged=True)

    def content(self, request: Request, oid: str) -> Answer:
        if "Authorization" in request.headers:
            return Answer(400, b"<Error><Code>InvalidArgument</Code></Error>")
        if oid not in self.objects:
            return Answer(404)
        return Answer(200, self.objects[oid], {"ETag": f'"{oid}"'}, ranged=True)

    def acceleration(self, request: Request) -> Answer:
        return ok({})

    # --- writing

    def create(self, request: Request) -> Answer:
        if request.token != self.token:
            return refusal(401, "Unauthorized: the access token is invalid or expired", 10010205001)
        wanted = request.json()
        repo = f"{wanted['Path']}/{wanted['Name']}"
        if repo in self.repos:
            return refusal(400, "the model name is already in use", ALREADY_EXISTS)
        first: dict[str, Blob] = {".gitattributes": b"*.safetensors filter=lfs\n", "README.md": b"# a new model\n"}
        self.repos[repo] = Repo(wanted.get("Visibility") == PRIVATE, {"master": first}, ["first commit"])
        return ok({"Id": 1, "Path": wanted["Path"], "Name": wanted["Name"]})

    def batch(self, request: Request, repo: str) -> Answer:
        found = self._open(request, repo, write=True)
        if isinstance(found, Answer):
            return found
        objects = []
        for wanted in request.json()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                entry["actions"] = {"upload": {"href": f"{self.url}/put/{wanted['oid']}?signature=of-the-tests"}}
            objects.append(entry)
        return ok({"objects": objects})

    def put(self, request: Request, oid: str) -> Answer:
        if sha256(request.body) != oid:
            return refusal(400, "the content's sha256 is another")
        self.objects[oid] = request.body
        return ok({})

    def commit(self, request: Request, repo: str, rev: str) -> Answer:
        files = self._files(request, repo, rev, write=True)
        if isinstance(files, Answer):
            return files
        wanted, changed = request.json(), dict(files)
        for action in wanted["actions"]:
            if action["type"] == "lfs":
                if action["sha256"] not in self.objects:
                    return refusal(400, f"the object of {action['path']} was not sent")
                changed[action["path"]] = self.objects[action["sha256"]]
            else:
                changed[action["path"]] = base64.b64decode(action["content"])
        self.repos[repo].branches[rev] = changed
        self.repos[repo].messages.append(wanted["commit_message"])
        return ok({"oid": _revision_of(changed)})


def ok(data: object) -> Answer:
    return as_json({"Code": 200, "Success": True, "Message": "success", "RequestId": "0", "Data": data})


def refusal(status: int, message: str, code: int = 10010205000) -> Answer:
    return as_json({"Code": code, "Success": False, "Message": message, "RequestId": "0"}, status)


def _revision_of(files: Mapping[str, Blob]) -> str:
    listing = repr([(name, sha256(blob)) for name, blob in sorted(files.items())])
    return hashlib.sha1(listing.encode()).hexdigest()


def stored(repo: Repo, revision: str = "master") -> dict[str, bytes]:
    """What arrived, by path."""
    return {path: read(blob) for path, blob in repo.files(revision).items()}


_ID = r"(?P<repo>[^/]+/[^/]+)"
_REV = r"(?P<rev>.+)"  # modelscope_hub does not quote it
_Action = Callable[..., Answer]
_ROUTES: list[tuple[str, str, _Action]] = [
    ("POST", "/api/v1/models", ModelScope.create),
    ("GET", "/api/v1/repos/internalAccelerationInfo", ModelScope.acceleration),
    ("GET", rf"/openapi/v1/models/{_ID}", ModelScope.open_info),
    ("GET", rf"/api/v1/models/{_ID}", ModelScope.info),
    ("GET", rf"/api/v1/models/{_ID}/revisions", ModelScope.revisions),
    ("GET", rf"/api/v1/models/{_ID}/repo/files", ModelScope.listing),
    ("ANY", rf"/api/v1/models/{_ID}/repo", ModelScope.download),
    ("ANY", r"/oss/(?P<oid>\w+)", ModelScope.content),
    ("POST", rf"/api/v1/repos/models/{_ID}/info/lfs/objects/batch", ModelScope.batch),
    ("PUT", r"/put/(?P<oid>\w+)", ModelScope.put),
    ("POST", rf"/api/v1/repos/models/{_ID}/commit/{_REV}", ModelScope.commit),
]
