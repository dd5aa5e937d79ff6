"""A stand-in for the Hugging Face hub: what ``huggingface_hub`` asks for when a model is published and loaded again,
over HTTP, and nothing else. It keeps what it was told and by whom, and can be made to fail."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import yaml

USERS = {"hf_writes": ("me", ["club"], True), "hf_reads": ("me", ["club"], False)}  # token: name, organizations, writes
LICENSES = {"apache-2.0", "mit", "openrail++", "creativeml-openrail-m", "other"}


@dataclass
class Repo:
    """``files`` at the last of ``commits``, of which each names what it added."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    @property
    def card(self) -> dict[str, Any]:
        found = re.match(r"---\n(.*?)\n---\n", self.files.get("README.md", b"").decode(), re.DOTALL)
        return yaml.safe_load(found[1]) if found else {}


@dataclass
class Hub:
    """``requests`` are ``(method, path)``; ``fails`` maps a pattern of ``METHOD path`` to the status it gets."""

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fails: dict[str, int] = field(default_factory=dict)
    address: str = ""
    sent: int = 0  # bytes of files

    def asked(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, f"{method} {path}")) for method, path in self.requests)


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_arguments: Any) -> None:
        pass

    def say(self, status: int, body: Any = None, headers: dict[str, str] | None = None, error: str = "") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {"error": error}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        if error:
            self.send_header("X-Error-Message", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_one(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path))
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, status in self.hub.fails.items():
            if re.search(pattern, f"{self.command} {path}"):
                return self.say(status, error=f"made to fail ({pattern})")
        if self.command == "PUT" and path.startswith("/blobs/"):  # signed URLs need no token
            oid = path.rpartition("/")[2]
            if hashlib.sha256(data).hexdigest() != oid:
                return self.say(400, error="another content than was said")
            self.hub.blobs[oid] = data
            return self.say(200, {})
        user = USERS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if user is None:
            return self.say(401, error="Invalid credentials in Authorization header")
        name, clubs, writes = user
        if path == "/api/whoami-v2":
            return self.say(200, {"name": name, "type": "user", "orgs": [{"name": club} for club in clubs]})
        if path == "/api/validate-yaml":
            return self.validate(json.loads(data)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(data), name, clubs, writes)
        if found := re.fullmatch(r"/(?:api/models/|(?:api/)?datasets/)?([^/]+/[^/]+?)((?:\.git)?/.*|)", path):
            repo = self.hub.repos.get(found[1])
            if repo is None or (repo.private and found[1].partition("/")[0] not in (name, *clubs)):
                return self.say(404, headers={"X-Error-Code": "RepoNotFound"}, error="Repository not found")
            return self.in_repo(found[1], repo, found[2], data, writes and found[1].partition("/")[0] in (name, *clubs))
        return self.say(404, error="no such address")

    do_GET = do_POST = do_PUT = do_HEAD = handle_one  # noqa: N815

    def validate(self, content: str) -> None:
        """As the hub does: ids of models and terms that it does not know are refused."""
        card = Repo(files={"README.md": content.encode()}).card
        wrong = []
        if "base_model" in card and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(card["base_model"])):
            wrong.append({"message": f'"base_model[0]" with value "{card["base_model"]}" is not valid'})
        if "license" in card and card["license"] not in LICENSES:
            wrong.append({"message": '"license" must be one of ...'})
        self.say(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def create(self, asked: dict[str, Any], name: str, clubs: list[str], writes: bool) -> None:
        owner = asked["organization"] or name
        if not writes or owner not in (name, *clubs):
            return self.say(403, error=f"You don't have the rights to create a model under the namespace {owner}")
        repo_id = f"{owner}/{asked['name']}"
        known = repo_id in self.hub.repos
        if not known:
            self.hub.repos[repo_id] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        url = {"url": f"{self.hub.address}/{repo_id}", "name": repo_id, "id": "0"}
        return self.say(409 if known else 200, url, error="You already created this model repo" if known else "")

    def in_repo(self, repo_id: str, repo: Repo, rest: str, data: bytes, writes: bool) -> None:
        if rest in ("", "/revision/main", f"/revision/{repo.sha}"):
            siblings = [{"rfilename": file} for file in repo.files]
            info = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": repo.sha, "private": repo.private}
            return self.say(200, info | {"siblings": siblings, "tags": [], "cardData": repo.card})
        if rest.startswith(("/tree/", "/paths-info/")):
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in repo.files.items()
                if rest.startswith("/tree/") or file in parse_qs(data.decode())["paths"]
            ]
            below = "".join(part + "/" for part in rest.split("/")[3:])  # /tree/commit/folder
            if rest.startswith("/tree/") and "recursive=true" not in self.path.lower():
                inside = [entry["path"].removeprefix(below) for entry in entries if entry["path"].startswith(below)]
                folders = sorted({below + name.partition("/")[0] for name in inside if "/" in name})
                entries = [entry for entry in entries if entry["path"].rpartition("/")[0] == below.rstrip("/")]
                entries += [{"type": "directory", "path": name, "oid": "0"} for name in folders]
            return self.say(200, entries)
        if found := re.fullmatch(r"/resolve/[^/]+/(.+)", rest):
            if found[1] not in repo.files:
                return self.say(404, headers={"X-Error-Code": "EntryNotFound"}, error="Entry not found")
            content = repo.files[found[1]]
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            status, span = 200, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if span:
                status, content = 206, content[int(span[1]) : int(span[2]) + 1]
            self.hub.sent += len(content) if self.command == "GET" else 0
            return self.say(status, content, {"ETag": tag, "X-Repo-Commit": repo.sha})
        if not writes:
            return self.say(403, error="this token may not write here")
        if rest == "/auth-check/write":
            return self.say(200, {})
        if rest == "/preupload/main":
            asked = json.loads(data)["files"]
            modes = [("lfs" if file["path"].endswith((".safetensors", ".png")) else "regular") for file in asked]
            said = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for file, mode in zip(asked, modes, strict=True)
            ]
            return self.say(200, {"files": said})
        if rest == ".git/info/lfs/objects/batch":
            return self.say(
                200, {"transfer": "basic", "objects": [self.action(o) for o in json.loads(data)["objects"]]}
            )
        if rest == "/commit/main":
            return self.commit(repo_id, repo, [json.loads(line) for line in data.splitlines()])
        return self.say(404, error="no such address")

    def action(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.hub.blobs:  # nothing to upload
            return {"oid": asked["oid"], "size": asked["size"]}
        return asked | {"actions": {"upload": {"href": f"{self.hub.address}/blobs/{asked['oid']}", "header": {}}}}

    def commit(self, repo_id: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        """All lines or none, as git does."""
        added: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.say(400, error=f"{value['path']} was never uploaded")
                added[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] != "header":
                return self.say(400, error=f"unknown {line['key']}")
        repo.files |= added
        repo.commits.append(list(added))
        url = f"{self.hub.address}/{repo_id}/commit/{repo.sha}"
        return self.say(200, {"success": True, "commitOid": repo.sha, "commitUrl": url})


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Answers,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
