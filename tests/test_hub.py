"""Teachers from a hub, which is a server on 127.0.0.1 that speaks the hub's protocol, and what may stand for one.

- A hub teacher is the teacher; only its files are fetched, once; the cache serves when the hub does not.
- Whatever fails is one sentence.
- A named teacher tries its mirrors, and its weights are the published ones by the sha256 that the hub states.
- Names, folders and hub ids are understood; what can be none of them is one sentence.
"""

import hashlib
import shutil

import huggingface_hub.constants as constants
import pytest

import plumbing.hub
from conftest import TINY, edit
from plumbing.files import BadInput, user_spec
from plumbing.hub import is_embedded, needed, resolve
from plumbing.weights import STEM, WEIGHTS
from student import load_student
from teacher import load_teacher


def downloads(hub):
    """The files that were asked for, by their paths in a repository."""
    return {path.split("/resolve/")[1].split("/", 1)[1] for method, path in hub.seen
            if method == "GET" and "/resolve/" in path}


# ------------------------------------------------------------------------------------------------- what is fetched
def test_hub_teacher_is_the_teacher_and_only_its_files_are_fetched(hub, tiny, call, tmp_path):
    assert load_teacher("somebody/tiny").fingerprint == tiny.fingerprint
    fetched = downloads(hub)
    assert f"unet/{WEIGHTS}" in fetched and "tokenizer/merges.txt" in fetched
    assert not any(name.endswith((".bin", ".md", ".png")) or name.startswith("v1-5") for name in fetched)
    hub.seen.clear()
    code, said, error = call("train", "--teacher", "somebody/tiny", "--out", tmp_path / "run", "--dry-run")
    assert code == 0 and "somebody/tiny -> " in said, error
    assert hub.seen and not downloads(hub)                  # from the cache


def test_files_of_every_layout_are_needed_and_no_others():
    """Tokenizers of old and new libraries, shards, fp16, a student, and what tells a model of latents."""
    small = ["model_index.json", "tokenizer/vocab.json", "tokenizer/tokenizer.json", "tokenizer/added_tokens.json",
             "vqvae/config.json", "student/student.json", "prompts.txt"]
    weights = [f"unet/{STEM}-00001-of-00002.safetensors", f"unet/{STEM}-00002-of-00002.safetensors",
               f"vae/{STEM}.fp16.safetensors", "text_encoder/model.safetensors", f"student/{WEIGHTS}"]
    others = ["v1-5.safetensors", f"unet/{STEM}.bin", f"unet/{STEM}.fp16.safetensors", "README.md", "a/b/config.json",
              "text_encoder/model.fp16.safetensors", "safety_checker/model.safetensors", f"vqvae/{WEIGHTS}"]
    assert set(needed(small + weights + others, None)) == {*small, *weights}
    index, shards = f"unet/{STEM}.safetensors.index.json", ["unet/a.safetensors", "unet/b.safetensors"]
    assert set(needed([index, *shards, *weights], lambda name: {"weight_map": {"x": "a.safetensors"}})) == {
        index, shards[0], *weights[2:]}


def test_cache_serves_when_the_hub_does_not(hub, tiny, monkeypatch):
    load_teacher("somebody/tiny@v1")
    hub.fail["/"] = 503
    assert load_teacher("somebody/tiny@v1").fingerprint == tiny.fingerprint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.seen.clear()
    assert load_teacher("somebody/tiny@v1").fingerprint == tiny.fingerprint and not hub.seen
    with pytest.raises(BadInput, match="somebody/tiny can't be had"):
        load_teacher("somebody/tiny")                       # another revision, never fetched


@pytest.mark.parametrize("spec, fail, message", [
    ("somebody/else", {}, "does not exist, or is private"),
    ("somebody/tiny@v2", {}, "has no such revision"),
    ("somebody/tiny", {"/api/": "gated"}, "is gated: accept its licence.* HF_TOKEN"),
    ("somebody/tiny", {"/resolve/": "gated"}, "is gated: accept its licence.* HF_TOKEN"),
    ("somebody/tiny", {f"unet/{WEIGHTS}": 500}, "can't be had .*500.*give the same command again"),
    ("somebody/sharded", {".index.json": "gated"}, "is gated: accept its licence.* HF_TOKEN"),
    ("somebody/pickled", {}, "only pickled weights.*convert them once"),
    ("somebody/empty", {}, "has no weights in safetensors")])
def test_what_fails_at_the_hub_is_one_sentence(hub, tmp_path, spec, fail, message):
    hub.fail.update(fail)
    for name, file in (("pickled", f"{STEM}.bin"), ("empty", "model_index.json"),
                       ("sharded", f"unet/{STEM}.safetensors.index.json")):
        hub.repos[f"somebody/{name}"] = tmp_path / name
        edit(tmp_path / name / file)
    with pytest.raises(BadInput, match=message) as caught:
        load_teacher(spec)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- named teachers
@pytest.fixture
def name(hub, monkeypatch):
    """A function: repositories and {part: sha256} -> what sd21 stands for from now on."""
    def name(*repositories, **sha256):
        monkeypatch.setitem(plumbing.hub.HUB, "sd21", {"repositories": list(repositories), "sha256": sha256})
    return name


PUBLISHED = hashlib.sha256((TINY / "unet" / WEIGHTS).read_bytes()).hexdigest()


def test_named_teacher_tries_mirrors_and_checks_its_weights(hub, name, tiny, tmp_path, capsys, monkeypatch):
    """The first mirror is gone, the second has other weights than published, the third is right. Nothing is hashed:
    in the cache, a link leads to a file that is called by the sha256 that the hub states. Where there are no links, as
    on Windows, there is no such name, and no check."""
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("a file was hashed"))
    wrong = hub.repos["bad/mirror"] = shutil.copytree(hub.repos["somebody/tiny"], tmp_path / "wrong")
    (wrong / "unet" / WEIGHTS).write_bytes((wrong / "unet" / WEIGHTS).read_bytes()[:-1] + b"!")
    name("gone/mirror", "bad/mirror", "somebody/tiny", unet=PUBLISHED)
    found = load_teacher("sd21")
    assert found.spec == "sd21" and found.fingerprint == tiny.fingerprint
    assert "sd21 is somebody/tiny" in capsys.readouterr().err
    name("gone/mirror", "bad/mirror", unet=PUBLISHED)
    cached = set((tmp_path / "cache").rglob("*"))
    with pytest.raises(BadInput, match="gone/mirror does not exist.*bad/mirror has another unet/.* sha256"):
        load_teacher("sd21")
    assert set((tmp_path / "cache").rglob("*")) >= cached               # nothing is deleted
    hub.fail["/"] = 503                                     # the cache is checked as well
    name("somebody/tiny", vae=PUBLISHED)
    with pytest.raises(BadInput, match="somebody/tiny has another vae/"):
        load_teacher("sd21")
    hub.fail.clear()
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{constants.HF_HUB_CACHE}2")
    assert not (load_teacher("sd21").folder / "unet" / WEIGHTS).is_symlink()


# ----------------------------------------------------------------------------------------- what may stand for a teacher
def test_names_folders_and_hub_ids_are_understood(hub, tmp_path, monkeypatch):
    shutil.copytree(TINY / "student", hub.repos["somebody/tiny"] / "student")
    for spec in ("somebody/tiny", "somebody/tiny/", "somebody/tiny@v1"):
        assert resolve(spec)[1] == spec.rstrip("/") and load_student(spec).input_time == 600
    hub.fail["/"] = 503
    assert resolve(f"{TINY}/pixel/") == resolve(TINY / "pixel")
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny/") == resolve("tiny") and user_spec("tiny/") == "tiny" and is_embedded("tiny")
    for name in ("sd21", "tiny"):                           # folders, though these are names
        (tmp_path / name).mkdir()
        assert resolve(f"{name}/")[0].resolve() == resolve(f"./{name}")[0].resolve() == tmp_path / name
        assert user_spec(f"{name}/") == f"{name}/" and not is_embedded(f"{name}/")
    with pytest.warns(UserWarning, match="tiny is taken for the teacher of this name, not for the folder ./tiny"):
        assert resolve("tiny")[0] == TINY


@pytest.mark.parametrize("spec, message", [
    ("https://huggingface.co/some/body", "nor a hub id, OWNER/NAME"), ("a/b/c", "nor a hub id"),
    ("sd-21", "neither a name .*tiny, .*sd21, .*nor a hub id"),
    ("tiny/pixle", "tiny/pixle is no folder here, and at the hub tiny/pixle does not exist"),
    ("v1-5.safetensors", "is one file, not a folder.*from_single_file")])
def test_what_can_be_no_teacher_is_one_sentence(hub, spec, message):
    with pytest.raises(BadInput, match=message):
        resolve(spec)
