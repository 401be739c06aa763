"""A hub on this machine: downloads, faults, and uploads whose files go into the commit itself."""

import base64
import functools
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """repos: {"owner/name": folder}. fail: {part of a path: status, or "gated"}. seen: (method, path) of all requests.
    files: {path: bytes} of the commits that were pushed. visibility: of the repositories that were created."""

    @classmethod
    def on_port(cls, port):
        """The hub of a port, as new. One serves all tests, because the client keeps its connections."""
        hub = cls.start(port)
        hub.repos, hub.fail, hub.seen, hub.files, hub.visibility = {}, {}, [], {}, []
        return hub

    @classmethod
    @functools.cache
    def start(cls, port):
        hub = cls(("127.0.0.1", port), Handler)
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        return hub


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def is_refused(self, path):
        """Whether this request fails, which has been answered then."""
        self.server.seen.append((self.command, path))
        fault = next((fault for part, fault in self.server.fail.items() if part in path), None)
        if fault:
            code = "GatedRepo" if fault == "gated" else "Fault"
            self.answer(403 if fault == "gated" else fault, {"error": code}, X_Error_Code=code)
        return fault is not None

    def do_GET(self):
        hub, path = self.server, unquote(urlparse(self.path).path)
        if self.is_refused(path):
            return
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision = (api[1], api[3]) if api else (file[1], file[2]) if file else (None, None)
        if repo not in hub.repos:
            return self.answer(401, X_Error_Code="RepoNotFound")            # the hub hides what is private: not 404
        if revision not in (None, "main", "v1", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        folder = hub.repos[repo]
        if api:
            names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            tree = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "0" * 40} for n in names]
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            return self.answer(200, tree if api[2] == "tree" else info, Content_Type="application/json")
        if not (folder / file[3]).is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        body = (folder / file[3]).read_bytes()
        self.answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self):
        hub, lines = self.server, [json.loads(line) for line in self.body().splitlines()]
        if self.is_refused(self.path):
            return
        answer = {}                                         # the card's front matter is asked about
        if self.path == "/api/repos/create":
            hub.visibility.append(lines[0].get("visibility"))
            answer = {"url": f"http://127.0.0.1/{lines[0]['organization']}/{lines[0]['name']}"}
        elif "/preupload/" in self.path:
            answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                for file in lines[0]["files"]]}
        elif "/commit/" in self.path:
            hub.files |= {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                          for line in lines if line["key"] == "file"}
            answer = {"commitUrl": "http://127.0.0.1/me/boot/commit/c", "commitOid": COMMIT}
        self.answer(200, answer, Content_Type="application/json")

    def body(self):
        """The request's, which may come in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)
