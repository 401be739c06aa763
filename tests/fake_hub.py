"""A hub on this machine: downloads with faults, and uploads whose files go into the commit itself."""

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
    """repos: {"owner/name": folder}. fail: {part of a path: status, "gated" or "cut"}. seen: (method, path, range).
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

    def error(self, status, code):
        self.answer(status, X_Error_Code=code, X_Error_Message=code)

    def fault(self, path):
        """What is wrong with this request, if anything: then a status has been answered, unless it is "cut"."""
        hub = self.server
        hub.seen.append((self.command, path, self.headers.get("Range")))
        fault = next((fault for part, fault in hub.fail.items() if part in path), None)
        if fault == "gated":
            self.error(403, "GatedRepo")
        elif isinstance(fault, int):
            self.answer(fault)
        return fault

    def do_GET(self):
        hub, path = self.server, unquote(urlparse(self.path).path)
        if (fault := self.fault(path)) not in (None, "cut"):
            return
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision = (api[1], api[3]) if api else (file[1], file[2]) if file else (None, None)
        if repo not in hub.repos:
            return self.error(401, "RepoNotFound")          # the hub hides what is private: 401, not 404
        if revision not in (None, "main", "v1", COMMIT):
            return self.error(404, "RevisionNotFound")
        folder = hub.repos[repo]
        if api:
            names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            tree = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "0" * 40} for n in names]
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            self.answer(200, tree if api[2] == "tree" else info, Content_Type="application/json")
        elif (folder / file[3]).is_file():
            self.send_file(folder / file[3], cut=fault == "cut")
        else:
            self.error(404, "EntryNotFound")

    do_HEAD = do_GET

    def send_file(self, path, cut):
        """The file, from where the client wants it; cut: half of it, and the line goes dead."""
        body = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if self.command == "GET" and cut and start == 0:
            self.close_connection = True
            return self.answer(200, body[:len(body) // 2], Content_Length=len(body))
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(206 if start else 200, body[start:], **headers)

    def do_POST(self):
        hub, lines = self.server, [json.loads(line) for line in self.body().splitlines()]
        if self.fault(self.path) is not None:
            return
        if self.path == "/api/repos/create":
            hub.visibility.append(lines[0].get("visibility"))
            self.answer(200, {"url": f"http://127.0.0.1/{lines[0]['organization']}/{lines[0]['name']}"})
        elif "/preupload/" in self.path:
            self.answer(200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                        for file in lines[0]["files"]]})
        elif "/commit/" in self.path:
            hub.files |= {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                          for line in lines if line["key"] == "file"}
            self.answer(200, {"commitUrl": "http://127.0.0.1/me/boot/commit/c", "commitOid": COMMIT})
        else:
            self.answer(200, {})                            # the card's front matter is asked about

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
