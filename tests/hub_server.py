"""A small server that speaks the Hub's routes, for the real client: repositories, files, ranges, redirects, commits."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub:
    """What the server has, what it is to do wrong, and what it was asked.

    Files of ``.pth``, ``.ckpt`` and ``.safetensors`` are large ones: their metadata redirects to another route.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.elsewhere: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.licence: str | None = None
        self.cut: dict[str, int] = {}  # file: how many more answers break off half-way
        self.damage: set[str] = set()  # files that arrive with a flipped bit
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.endpoint = self.elsewhere_endpoint = ""  # large files lie on another host

    def add(self, repo: str, files: dict[str, bytes | Path]) -> None:
        """Puts files into a repository, which is made if there is none."""
        content = {
            name: data.read_bytes() if isinstance(data, Path) else data
            for name, data in files.items()
        }
        self.repos.setdefault(repo, {}).update(content)

    def info(self, repo: str) -> dict:
        """What ``/api/models`` tells of a repository."""
        siblings = []
        for name, data in self.repos[repo].items():
            file = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if large(name):
                sha256 = hashlib.sha256(data).hexdigest()
                file["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(file)
        tags = [f"license:{self.licence}"] if self.licence else []
        return {
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "private": repo in self.private,
            "tags": tags,
            "siblings": siblings,
        }

    def entries(self, repo: str) -> list[dict]:
        """What the routes of a data set's tree and paths tell of each folder and file."""
        files = self.repos[repo].items()
        folders = sorted({folder for name, _ in files for folder in parents(name) if folder})
        entries = [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in folders]
        return entries + [
            {"type": "file", "path": n, "size": len(data), "oid": git_sha1(data)}
            for n, data in files
        ]


def parents(path: str) -> list[str]:
    """The folders that a path lies in, from the nearest to the repository itself, which is empty."""
    return [str(folder) if folder.name else "" for folder in PurePosixPath(path).parents]


def large(name: str) -> bool:
    return name.endswith((".pth", ".ckpt", ".safetensors"))


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The routes."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tell(self, content: dict | list) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str | None = None) -> None:
        headers = (
            {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": COMMIT} if code else {}
        )
        self.answer(status, b"", headers)

    def allowed(self, repo: str) -> bool:
        """Answers with a refusal unless ``repo`` is there and may be read."""
        signed_in = self.headers.get("Authorization") == "Bearer hf_right"
        if repo not in self.hub.repos or (repo in self.hub.private and not signed_in):
            self.refuse(
                401 if not signed_in else 404, "RepoNotFound"
            )  # the Hub does not tell them apart
        elif repo in self.hub.gated and not signed_in:
            self.refuse(403, "GatedRepo")
        else:
            return True
        return False

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if found := re.fullmatch(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path
        ):
            repo, revision = found.groups()
            if self.allowed(repo):
                known = revision in (None, "main", COMMIT)
                self.tell(self.hub.info(repo)) if known else self.refuse(404, "RevisionNotFound")
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            if self.allowed(found[1]):
                self.tell(
                    [
                        entry
                        for entry in self.hub.entries(found[1])
                        if found[2] in parents(entry["path"])
                    ]
                )
        elif found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*found.groups())
        elif found := re.fullmatch(r"/large/([^/]+/[^/]+)/(.+)", path):
            repo, name = found.groups()
            self.send(name, self.hub.repos[repo][name])
        elif path in self.hub.elsewhere:
            self.send(path, self.hub.elsewhere[path])
        else:
            self.refuse(404)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if not self.allowed(repo):
            return
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if name not in self.hub.repos[repo]:
            return self.refuse(404, "EntryNotFound")
        data = self.hub.repos[repo][name]
        headers = {"X-Repo-Commit": COMMIT}
        if large(name):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = len(data)
            headers["Location"] = f"{self.hub.elsewhere_endpoint}/large/{repo}/{name}"
            return self.answer(302, b"", headers)
        headers["ETag"] = f'"{git_sha1(data)}"'
        return self.send(name, data, headers)

    def send(self, name: str, data: bytes, headers: dict | None = None) -> None:
        """A file, or the range of it that was asked for; broken off or damaged where it is to be."""
        headers, status = {"Accept-Ranges": "bytes", **(headers or {})}, 200
        if name in self.hub.damage and self.command == "GET":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        total = len(data)
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(found[1]), 206
            if start >= total:
                return self.answer(416, b"", {"Content-Range": f"bytes */{total}"})
            data = data[start:]
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        if self.command == "HEAD":
            self.send_response(status)
            for key, value in {**headers, "Content-Length": len(data)}.items():
                self.send_header(key, str(value))
            return self.end_headers()
        if self.hub.cut.get(name, 0) > 0:
            self.hub.cut[name] -= 1
            self.send_response(status)
            for key, value in {**headers, "Content-Length": len(data)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self.answer(status, data, headers)

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append((self.command, path, None))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            asked = (
                parse_qs(body.decode())["paths"] if b"=" in body[:6] else json.loads(body)["paths"]
            )
            return self.tell(
                [entry for entry in self.hub.entries(found[1]) if entry["path"] in asked]
            )
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.refuse(401)
        if path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given.get('organization') or 'user'}/{given['name']}"
            private = given.get("private") or given.get("visibility") == "private"
            if private and repo not in self.hub.repos:
                self.hub.private.add(repo)
            self.hub.repos.setdefault(repo, {})
            return self.tell({"url": f"{self.hub.endpoint}/{repo}", "id": repo, "name": repo})
        if path == "/api/validate-yaml":
            return self.tell({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            given = json.loads(body)["files"]
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in given
            ]
            return self.tell({"files": files})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.hub.add(found[1], {value["path"]: base64.b64decode(value["content"])})
            url = f"{self.hub.endpoint}/{found[1]}/commit/{COMMIT}"
            return self.tell({"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.refuse(404)


@contextmanager
def serving():
    """A running server on a free port: its :class:`Hub`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    hub.elsewhere_endpoint = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
