"""A hub on this machine, with downloads and faults."""

import functools
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40


@functools.cache
def hub_on(port):
    """The hub of a port. One serves all tests, because the client keeps its connections.
    repos: {"owner/name": folder}. fail: {part of a path: status, or "gated"}. seen: (method, path) of all requests."""
    hub = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return hub


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, unquote(urlparse(self.path).path)
        hub.seen.append((self.command, path))
        fault = next((fault for part, fault in hub.fail.items() if part in path), None)
        if fault:
            status, code = (403, "GatedRepo") if fault == "gated" else (fault, "Fault")
            return self.answer(status, X_Error_Code=code)
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
            body = json.dumps(tree if api[2] == "tree" else info).encode()
            return self.answer(200, body, Content_Type="application/json")
        if not (folder / file[3]).is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        body = (folder / file[3]).read_bytes()
        self.answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET
