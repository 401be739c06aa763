"""Teachers from a hub: a server on 127.0.0.1 that speaks the hub's protocol, and what goes wrong with one."""

import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import huggingface_hub.constants as constants
import pytest

import checkpoint
from plumbing.files import BadInput
from plumbing.hub import TINY
from plumbing.weights import WEIGHTS
from conftest import HUB_PORT
from teacher import load_teacher

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """repos: {"owner/name": folder}. fail: {part of a path: status, "gated" or "cut"}. seen: (method, path, range)."""

    def __init__(self):
        super().__init__(("127.0.0.1", HUB_PORT), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def error(self, status, code):
        self.answer(status, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self):
        hub, path = self.server, unquote(urlparse(self.path).path)
        hub.seen.append((self.command, path, self.headers.get("Range")))
        fault = next((fault for part, fault in hub.fail.items() if part in path), None)
        if fault == "gated":
            return self.error(403, "GatedRepo")
        if isinstance(fault, int):
            return self.answer(fault)
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
            return self.answer(200, json.dumps(tree if api[2] == "tree" else info).encode(),
                               Content_Type="application/json")
        if not (folder / file[3]).is_file():
            return self.error(404, "EntryNotFound")
        body = (folder / file[3]).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
        if self.command == "HEAD":
            return self.answer(200, body, **headers)
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if fault == "cut" and start == 0:                   # half of it, and the line goes dead
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2])
            self.close_connection = True
            return
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(206 if start else 200, body[start:], **headers)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def server():                                               # one for all tests: the client keeps its connections
    return Hub()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    hub = server
    hub.repos, hub.fail, hub.seen = {}, {}, []
    folder = shutil.copytree(TINY, tmp_path / "repo", ignore=shutil.ignore_patterns("evaluation", "judge"))
    (folder / "v1-5-pruned.safetensors").write_bytes(b"too much")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    hub.repos["somebody/tiny"] = folder
    monkeypatch.setattr(time, "sleep", lambda _: None)      # the client's pauses between attempts
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def test_hub_teacher_is_the_teacher_and_only_its_files_are_fetched(hub, tiny):
    assert load_teacher("somebody/tiny").fingerprint == tiny.fingerprint
    fetched = {path.split("/resolve/")[1].split("/", 1)[1] for _, path, _ in hub.seen if "/resolve/" in path}
    assert f"unet/{WEIGHTS}" in fetched and "tokenizer/merges.txt" in fetched
    assert not any(name.endswith((".bin", ".md", ".png")) or name.startswith("v1-5") for name in fetched)
    hub.seen.clear()
    load_teacher("somebody/tiny")
    assert not any(method == "GET" and "/resolve/" in path for method, path, _ in hub.seen)     # from the cache


def test_cache_serves_when_the_hub_does_not(hub, tiny, monkeypatch):
    load_teacher("somebody/tiny@v1")
    hub.fail["/"] = 503
    assert load_teacher("somebody/tiny@v1").fingerprint == tiny.fingerprint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.seen.clear()
    assert load_teacher("somebody/tiny@v1").fingerprint == tiny.fingerprint and not hub.seen
    with pytest.raises(BadInput, match="somebody/tiny can't be had"):
        load_teacher("somebody/tiny")                       # another revision, never fetched


def test_broken_transfer_goes_on_where_it_broke_off(hub, tiny, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)      # what is kept of a broken transfer
    hub.fail[f"unet/{WEIGHTS}"] = "cut"
    assert load_teacher("somebody/tiny").fingerprint == tiny.fingerprint
    begun = [span for method, path, span in hub.seen if method == "GET" and path.endswith(f"unet/{WEIGHTS}")]
    assert begun[0] is None and int(begun[1].removeprefix("bytes=").removesuffix("-")) > 2**20


@pytest.mark.parametrize("spec, fail, message", [
    ("somebody/else", {}, "does not exist, or is private"),
    ("somebody/tiny@v2", {}, "has no such revision"),
    ("somebody/tiny", {"/api/": "gated"}, "is gated: accept its licence.* HF_TOKEN"),
    ("somebody/tiny", {"/resolve/": "gated"}, "is gated: accept its licence.* HF_TOKEN"),
    ("somebody/tiny", {f"unet/{WEIGHTS}": 500}, "can't be had .*500.*give the same command again")])
def test_what_fails_at_the_hub_is_one_sentence(hub, spec, fail, message):
    hub.fail.update(fail)
    with pytest.raises(BadInput, match=message) as caught:
        load_teacher(spec)
    assert "\n" not in str(caught.value)


def test_full_disk_is_named(hub, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "snapshot_download", full)
    with pytest.raises(BadInput, match="somebody/tiny does not fit on this disk: make room, or set HF_HOME"):
        load_teacher("somebody/tiny")


def test_repository_without_safetensors_is_refused(hub):
    for path in hub.repos["somebody/tiny"].rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(BadInput, match="only pickled weights.*convert them once"):
        load_teacher("somebody/tiny")
    for path in hub.repos["somebody/tiny"].rglob("*.bin"):
        path.unlink()
    with pytest.raises(BadInput, match="no weights in safetensors"):
        load_teacher("somebody/tiny")


def named(*repositories, **sha256):
    """An entry of hub.json."""
    return {"repositories": list(repositories), "sha256": sha256}


def test_tokenizers_of_every_layout_are_fetched(hub, tiny):
    """Added tokens; and tokenizer.json without the two older files, as transformers 5 writes it."""
    folder = hub.repos["somebody/tiny"] / "tokenizer"
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": len(tiny.tokenizer.vocab)}))
    with pytest.raises(BadInput, match="vocab_size = .* is not supported"):
        load_teacher("somebody/tiny")
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    for name in ("added_tokens.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    whole = {"model": {"vocab": vocab, "merges": merges}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    hub.repos["else/tiny"] = hub.repos["somebody/tiny"]
    assert load_teacher("else/tiny").tokenizer.vocab == tiny.tokenizer.vocab


@pytest.mark.parametrize("index", [
    {"unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}, None])
def test_a_model_of_latents_does_not_pass_as_one_of_pixels(hub, index):
    """Not even where no model_index.json says what it is."""
    folder = shutil.copytree(TINY / "pixel", hub.repos["somebody/tiny"].parent / "latent")
    (folder / "vqvae").mkdir()
    (folder / "vqvae" / "config.json").write_text("{}")
    (folder / "model_index.json").unlink(missing_ok=True)
    if index:
        (folder / "model_index.json").write_text(json.dumps(index))
    hub.repos["somebody/latent"] = folder
    for spec in (folder, "somebody/latent"):
        with pytest.raises(BadInput, match="vqvae = .* is not supported" if index else "on latents is not supported"):
            load_teacher(spec)


def test_named_teacher_tries_mirrors_and_checks_its_hash(hub, tiny, monkeypatch, capsys):
    """The first mirror is gone, the second has other weights than published, the third is right."""
    good = hashlib.sha256((TINY / "unet" / WEIGHTS).read_bytes()).hexdigest()
    wrong = shutil.copytree(hub.repos["somebody/tiny"], hub.repos["somebody/tiny"].parent / "wrong")
    with open(wrong / "unet" / WEIGHTS, "r+b") as file:
        file.seek(-1, 2), file.write(b"!")
    hub.repos["bad/mirror"] = wrong
    monkeypatch.setitem(checkpoint.HUB, "sd21", named("gone/mirror", "bad/mirror", "somebody/tiny", unet=good))
    found = load_teacher("sd21")
    assert found.spec == "sd21" and found.fingerprint == tiny.fingerprint
    assert "sd21 is somebody/tiny" in capsys.readouterr().err
    hub.fail["/"] = 503                                     # the cache is checked as well
    monkeypatch.setitem(checkpoint.HUB, "sd21", named("somebody/tiny", vae=good))
    with pytest.raises(BadInput, match="somebody/tiny has another vae/"):
        load_teacher("sd21")
    hub.fail.clear()
    monkeypatch.setitem(checkpoint.HUB, "sd21", named("gone/mirror", "bad/mirror", unet=good))
    for _ in range(2):                                      # the wrong file was not left in the cache
        with pytest.raises(BadInput, match="gone/mirror does not exist.*bad/mirror has another unet/.* deleted again"):
            load_teacher("sd21")
    fetched = [path for method, path, _ in hub.seen if method == "GET" and path.startswith("/bad/mirror/resolve")]
    assert sum(path.endswith("unet/" + WEIGHTS) for path in fetched) == 3


def test_weights_are_hashed_once_for_each_file(hub, monkeypatch):
    """However many processes start, together or later; a file that has changed is hashed again."""
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    good = hashlib.sha256((TINY / "unet" / WEIGHTS).read_bytes()).hexdigest()
    monkeypatch.setitem(checkpoint.HUB, "sd21", named("somebody/tiny", unet=good))
    folder = load_teacher("sd21").folder
    load_teacher("sd21")
    assert len(hashed) == 1
    path = folder / "unet" / WEIGHTS
    os.utime(path, (1, 1))
    with ThreadPoolExecutor() as pool:
        assert set(pool.map(checkpoint.hash_once, [path] * 4)) == {good}
    assert len(hashed) == 2


def test_train_command_takes_a_hub_id(hub, call, tmp_path):
    code, out, error = call("train", "--teacher", "somebody/tiny", "--out", tmp_path / "run", "--dry-run")
    assert code == 0 and "somebody/tiny -> " in out, error
