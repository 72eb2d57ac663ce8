"""A Hugging Face Hub on this machine, for the real `huggingface_hub`. Sequences measured with 2.4.0, Xet off.

    with HuggingFace() as hub:
        hub.add("org/model", folder)
        subprocess.run(command, env=os.environ | hub.env)

Large files of a repository are sent by redirection to another host name, as the real one does with its CDN; that host
refuses an Authorization header, as signed addresses of S3 do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qs, unquote

from tests.hubs.huggingface_repo import Repo, is_lfs
from tests.hubs.loopback import (
    Answer,
    Blob,
    Loopback,
    Request,
    as_json,
    folder_files,
    git_sha1,
    read,
    sha256,
    size_of,
)


class HuggingFace(Loopback):
    """`repos` is what it holds, `objects` the contents by sha256 that were sent through LFS."""

    def __init__(self, token: str = "hf_goodTokenOfTheTests") -> None:
        super().__init__()
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, Blob] = {}
        self.part_bytes = 1 << 40  # LFS objects above it are sent in parts of this size
        self.tree_page = 1000
        self.cdn = True
        self._parts: dict[str, dict[int, bytes]] = {}
        self._cdn_url = f"http://localhost:{self.port}"  # another host than `url`, as far as clients can see

    @property
    def env(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(self.home),
            "HF_HUB_CACHE": str(self.home / "hub"),
            "HF_TOKEN": self.token,
            "no_proxy": "127.0.0.1,localhost",
        }

    def add(
        self,
        repo_id: str,
        files: Path | Mapping[str, Blob],
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Put a folder (served from where it lies) or files on the hub; returns the commit."""
        found = folder_files(files) if isinstance(files, Path) else dict(files)
        repo = self.repos.setdefault(repo_id, Repo(private, gated))
        for path, blob in found.items():
            if is_lfs(path, size_of(blob)):
                self.objects[sha256(blob)] = blob
        return repo.commit(revision, found)

    # --- dispatch

    def answer(self, request: Request) -> Answer:
        for method, pattern, action in _ROUTES:
            if method in (request.method, "ANY") and (match := re.fullmatch(pattern, request.quoted)):
                # Unquoted after matching: a revision may hold slashes (refs/pr/1), which clients quote.
                return action(self, request, **{k: unquote(v) for k, v in match.groupdict("").items()})
        return as_json({"error": f"no route for {request.method} {request.path}"}, 404)

    def _unknown_token(self, request: Request) -> Answer | None:
        if request.token in (None, self.token):
            return None
        return refusal(401, "Invalid credentials in Authorization header")

    def _open(self, request: Request, repo: str, *, write: bool = False) -> Repo | Answer:
        """The repository, or why not. Who has no token is not told whether it exists."""
        found = self.repos.get(repo)
        if refused := self._unknown_token(request):
            return refused
        if request.token is None and (write or found is None or found.private or found.gated):
            if found is not None and found.gated:
                return refusal(401, f"Access to model {repo} is restricted.", "GatedRepo")
            return refusal(401, "Repository not found", "RepoNotFound")
        return found if found is not None else refusal(404, "Repository not found", "RepoNotFound")

    def _at(self, request: Request, repo: str, revision: str) -> tuple[Repo, str] | Answer:
        found = self._open(request, repo)
        if isinstance(found, Answer):
            return found
        sha = found.find(revision)
        return (found, sha) if sha else refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    # --- reading

    def info(self, request: Request, repo: str, rev: str = "main") -> Answer:
        found = self._at(request, repo, rev)
        if isinstance(found, Answer):
            return found
        files = found[0].commits[found[1]]
        siblings = [
            {"rfilename": path, **({"size": size_of(b), **_lfs(path, b)} if "blobs" in request.query else {})}
            for path, b in files.items()
        ]
        return as_json(
            {
                "_id": "0" * 24,
                "id": repo,
                "modelId": repo,
                "sha": found[1],
                "private": found[0].private,
                "gated": found[0].gated,
                "tags": [],
                "siblings": siblings,
            }
        )

    def tree(self, request: Request, repo: str, rev: str, folder: str = "") -> Answer:
        found = self._at(request, repo, rev)
        if isinstance(found, Answer):
            return found
        files = found[0].commits[found[1]]
        prefix = f"{folder}/" if folder else ""
        entries = _entries({p: b for p, b in files.items() if p.startswith(prefix)}, prefix)
        if request.query.get("recursive", "").lower() != "true":
            entries = [e for e in entries if "/" not in str(e["path"]).removeprefix(prefix)]
        if prefix and not entries:
            return refusal(404, f"{folder} does not exist", "EntryNotFound")
        start = int(request.query.get("cursor", 0))
        page, rest = entries[start : start + self.tree_page], entries[start + self.tree_page :]
        query = "&".join(f"{k}={v}" for k, v in (request.query | {"cursor": str(start + self.tree_page)}).items())
        more = {"Link": f'<{self.url}{request.quoted}?{query}>; rel="next"'} if rest else {}
        return as_json(page, **more)

    def paths_info(self, request: Request, repo: str, rev: str) -> Answer:
        found = self._at(request, repo, rev)
        if isinstance(found, Answer):
            return found
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return as_json([e for e in _entries(found[0].commits[found[1]], "") if e["path"] in wanted])

    def resolve(self, request: Request, repo: str, rev: str, path: str) -> Answer:
        found = self._at(request, repo, rev)
        if isinstance(found, Answer):
            return found
        sha = found[1]
        blob = found[0].commits[sha].get(path)
        if blob is None:
            return refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        if not is_lfs(path, size_of(blob)):
            return Answer(200, blob, headers | {"ETag": f'"{git_sha1(read(blob))}"'}, ranged=True)
        oid = sha256(blob)
        headers |= {"X-Linked-Size": str(size_of(blob)), "X-Linked-Etag": f'"{oid}"'}
        if self.cdn:
            return Answer(302, b"", headers | {"Location": f"{self._cdn_url}/cdn/{oid}?signature=of-the-tests"})
        return Answer(200, blob, headers | {"ETag": f'"{oid}"'}, ranged=True)

    def content(self, request: Request, oid: str) -> Answer:
        if request.token is not None:
            return Answer(400, b"<Error><Code>InvalidArgument</Code></Error>")
        if oid not in self.objects:
            return Answer(404)
        return Answer(200, self.objects[oid], {"ETag": f'"{oid}"'}, ranged=True)

    def whoami(self, request: Request) -> Answer:
        return self._unknown_token(request) or as_json({"type": "user", "name": "tester", "orgs": []})

    # --- writing

    def create(self, request: Request) -> Answer:
        if request.token is None or (refused := self._unknown_token(request)):
            return refused if request.token else refusal(401, "Invalid username or password.")
        wanted = request.json()
        repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if repo in self.repos:
            return as_json({"error": "You already created this model repo", "url": f"{self.url}/{repo}"}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        made = self.repos[repo] = Repo(private)
        made.commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit"
        )
        return as_json({"url": f"{self.url}/{repo}", "name": repo, "id": "0" * 24})

    def validate(self, request: Request) -> Answer:
        request.json()["content"]
        return as_json({"errors": [], "warnings": []})

    def branch(self, request: Request, repo: str, rev: str) -> Answer:
        found = self._open(request, repo, write=True)
        if isinstance(found, Answer):
            return found
        if rev in found.branches:
            return as_json({"error": f"Reference already exists: {rev}"}, 409)
        found.branches[rev] = found.branches["main"]
        return as_json({}, 201)

    def preupload(self, request: Request, repo: str, rev: str) -> Answer:
        found = self._open(request, repo, write=True)
        if isinstance(found, Answer):
            return found
        if (sha := found.find(rev)) is None:
            return refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        there = found.commits[sha]
        files = []
        for file in request.json()["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            oid = (sha256(there[path]) if mode == "lfs" else git_sha1(read(there[path]))) if path in there else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": files})

    def batch(self, request: Request, repo: str) -> Answer:
        found = self._open(request, repo, write=True)
        if isinstance(found, Answer):
            return found
        objects = []
        for wanted in request.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, object] = {"oid": oid, "size": size}
            if oid not in self.objects:  # else no actions: it is there already
                upload: dict[str, object] = {"href": f"{self.url}/put/{oid}"}
                if size > self.part_bytes:
                    count = -(-size // self.part_bytes)
                    parts = {str(n): f"{self.url}/put/{oid}/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{self.url}/complete/{oid}",
                        "header": {"chunk_size": str(self.part_bytes), **parts},
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/verify/{oid}"}}
            objects.append(entry)
        return as_json({"transfer": "basic", "objects": objects})

    def put(self, request: Request, oid: str, part: str = "") -> Answer:
        if part:
            self._parts.setdefault(oid, {})[int(part)] = request.body
            return Answer(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
        return self._store(oid, request.body)

    def complete(self, request: Request, oid: str) -> Answer:
        parts = self._parts.pop(oid, {})
        named = {p["partNumber"]: p["etag"] for p in request.json()["parts"]}
        if named != {n: f'"{hashlib.md5(data).hexdigest()}"' for n, data in parts.items()}:
            return as_json({"error": "parts do not match"}, 400)
        return self._store(oid, b"".join(parts[n] for n in sorted(parts)))

    def _store(self, oid: str, data: bytes) -> Answer:
        if sha256(data) != oid:
            return as_json({"error": "the content's sha256 is another"}, 400)
        self.objects[oid] = data
        return as_json({})

    def verify(self, request: Request, oid: str) -> Answer:
        there = oid in self.objects and size_of(self.objects[oid]) == request.json()["size"]
        return as_json({}, 200 if there else 404)

    def commit(self, request: Request, repo: str, rev: str) -> Answer:
        found = self._open(request, repo, write=True)
        if isinstance(found, Answer):
            return found
        if found.find(rev) is None:
            return refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        files, message = dict(found.commits[found.find(rev) or ""]), ""
        for line in request.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return as_json({"error": "LFS pointer pointed to a file that does not exist"}, 400)
                files[value["path"]] = self.objects[value["oid"]]
        opened = None
        if request.query.get("create_pr") == "1":
            number = 1 + sum(name.startswith("refs/pr/") for name in found.branches)
            rev, opened = f"refs/pr/{number}", f"{self.url}/{repo}/discussions/{number}"
        sha = found.commit(rev, files, message)
        url = f"{self.url}/{repo}/commit/{sha}"
        return as_json({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": opened})


def refusal(status: int, message: str, code: str = "", **headers: str) -> Answer:
    """An error as the hub words it: the client goes by X-Error-Code."""
    named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return as_json({"error": message}, status, **named, **headers)


def _lfs(path: str, blob: Blob) -> dict[str, object]:
    size = size_of(blob)
    if not is_lfs(path, size):
        return {}
    return {"lfs": {"oid": sha256(blob), "sha256": sha256(blob), "size": size, "pointerSize": 134}}


def _entries(files: Mapping[str, Blob], prefix: str) -> list[dict[str, object]]:
    """Files and the folders that hold them, as the tree listing has them."""
    folders = {p.rpartition("/")[0] for p in files} - {""}
    folders |= {"/".join(f.split("/")[:n]) for f in folders for n in range(1, f.count("/") + 1)}
    entries: list[dict[str, object]] = [
        {"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in folders if f.startswith(prefix)
    ]
    for path, blob in files.items():
        oid = sha256(blob)[:40] if is_lfs(path, size_of(blob)) else git_sha1(read(blob))
        entries.append({"type": "file", "oid": oid, "size": size_of(blob), "path": path, **_lfs(path, blob)})
    return sorted(entries, key=lambda e: str(e["path"]))


_ID = r"(?P<repo>[^/]+/[^/]+)"
_REV = "(?P<rev>[^/]+)"
_Action = Callable[..., Answer]
_ROUTES: list[tuple[str, str, _Action]] = [
    ("GET", "/api/whoami-v2", HuggingFace.whoami),
    ("POST", "/api/repos/create", HuggingFace.create),
    ("POST", "/api/validate-yaml", HuggingFace.validate),
    ("GET", rf"/api/models/{_ID}", HuggingFace.info),
    ("GET", rf"/api/models/{_ID}/revision/{_REV}", HuggingFace.info),
    ("GET", rf"/api/models/{_ID}/tree/{_REV}(?:/(?P<folder>.+))?", HuggingFace.tree),
    ("POST", rf"/api/models/{_ID}/paths-info/{_REV}", HuggingFace.paths_info),
    ("POST", rf"/api/models/{_ID}/preupload/{_REV}", HuggingFace.preupload),
    ("POST", rf"/api/models/{_ID}/commit/{_REV}", HuggingFace.commit),
    ("POST", rf"/api/models/{_ID}/branch/{_REV}", HuggingFace.branch),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", HuggingFace.batch),
    ("PUT", r"/put/(?P<oid>\w+)(?:/(?P<part>\d+))?", HuggingFace.put),
    ("POST", r"/complete/(?P<oid>\w+)", HuggingFace.complete),
    ("POST", r"/verify/(?P<oid>\w+)", HuggingFace.verify),
    ("ANY", rf"/{_ID}/resolve/{_REV}/(?P<path>.+)", HuggingFace.resolve),
    ("ANY", r"/cdn/(?P<oid>\w+)", HuggingFace.content),
]
