"""Where a teacher or a student is: a name, a folder, or a repository of the Hugging Face hub.

    folder, spec = resolve("sd21")                          # a name, a hub id or a folder -> a local folder

Only the files needed are downloaded, never a pickle, into the hub's own cache; HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE work as usual.
"""

import contextlib
import re
import sys
import warnings
from pathlib import Path

from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

from plumbing.files import BadInput, parsing, read_json, user_path
from plumbing.weights import STEM, WEIGHTS, choose_weights

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
EMBEDDED = {"tiny": TINY, "tiny-pixel": TINY / "pixel"}     # the teachers that come with this code
# name -> its repositories, tried in order (Stability removed its own), and the published sha256 of its parts' weights
HUB = read_json(ROOT / "plumbing" / "hub.json")

# What stands for a repository: OWNER/NAME or OWNER/NAME@REVISION
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>.+))?")
CONVERT = "python -c \"from diffusers import {} as P; P.{}('{}').save_pretrained('DIR')\""
# The files beside the weights of which a teacher or a student is made
SMALL = ("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json", "tokenizer.json",
         "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "student.json", "prompts.txt",
         ".index.json", ".index.fp16.json")


def is_embedded(spec):
    """Whether spec, a name or a folder, is a teacher that comes with this code."""
    return str(spec) in EMBEDDED or Path(spec).resolve() in EMBEDDED.values()


def resolve(spec):
    """(folder, spec) of a name, a hub id, or a folder; a name or an id may end in @REVISION. The spec
    returned means the same from any working directory. Raises BadInput, one sentence."""
    if str(spec).endswith("/") and Path(spec).is_dir():     # a folder, even if it has the name of a teacher
        return find(spec)
    spec = str(spec).rstrip("/")
    named = spec.partition("@")[0] in {*EMBEDDED, *HUB}
    if named and Path(spec).is_dir() and Path(spec).resolve() not in EMBEDDED.values():
        warnings.warn(f"{spec} is taken for the teacher of this name, not for the folder ./{spec}", stacklevel=2)
    if spec in EMBEDDED:
        return EMBEDDED[spec], spec
    if spec.partition("@")[0] in HUB:
        return fetch_named(spec), spec
    return find(spec, f"a name ({', '.join([*EMBEDDED, *HUB])}), nor ")


def find(spec, names=""):
    """(folder, spec) of a folder or, fetched, of a hub repository. The spec returned means the same from any working
    directory. `names`: what else it might have been, for the message. Raises BadInput, one sentence."""
    path, found = user_path(spec), HUB_ID.fullmatch(str(spec).rstrip("/"))
    if path.is_dir():
        return path, str(path.resolve())
    if path.suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth"):
        convert = CONVERT.format("StableDiffusionPipeline", "from_single_file", spec)
        raise BadInput(f"{spec} is one file, not a folder: give the folder in which it lies or, if the file is a whole "
                       f"model, convert it once, by `{convert}`, then give DIR")
    if not found:
        raise BadInput(f"{spec!r} is neither {names}a folder, nor a hub id, OWNER/NAME")
    try:
        return fetch(found["repo"], found["revision"]), str(spec).rstrip("/")
    except BadInput as error:
        raise BadInput(f"{spec} is no folder here, and at the hub {error}") from None


def fetch_named(spec):
    """The folder of one of HUB's names, from the first of its repositories that has it as published."""
    name, _, revision = spec.partition("@")
    failures = []
    for repo in HUB[name]["repositories"]:
        try:
            folder = fetch(repo, revision or None)
            if not revision:                                # another revision has other weights
                check_weights(repo, folder, HUB[name]["sha256"])
            print(f"{name} is {repo}, in {folder}", file=sys.stderr)
            return folder
        except BadInput as error:
            failures.append(str(error))
    raise BadInput("; ".join(failures))


def check_weights(repo, folder, sha256):
    """Check that a named teacher's weights are the published ones. Raises BadInput.
    sha256: {part: of its weights, if they are one file}. Nothing is hashed here: the hub states the sha256 of a large
    file, and its cache names the file by it. A system without symbolic links has no such names, and no check."""
    for part, expected in sha256.items():
        path = folder / part / ("model.safetensors" if part == "text_encoder" else WEIGHTS)
        found = path.resolve().name
        if found not in (expected, path.name):
            raise BadInput(f"{repo} has another {part}/{path.name} than published: sha256 {found[:12]}, not "
                           f"{expected[:12]}")


def fetch(repo, revision=None):
    """The local folder of a hub repository, from the cache or downloaded: only the files needed, never a pickle.
    Honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Raises BadInput."""
    try:
        info = HfApi().model_info(repo, revision=revision)
    except Exception as error:                              # no network, or none wanted: then the cache may have it
        for name in ("model_index.json", "student.json", "config.json"):
            with contextlib.suppress(Exception):            # the client raises whatever its HTTP library does
                folder = Path(hf_hub_download(repo, name, revision=revision, local_files_only=True)).parent
                if any(folder.rglob("*.safetensors")):      # not what an interrupted download left
                    return folder
        raise BadInput(f"{repo} {explain(error)}") from None
    names = [file.rfilename for file in info.siblings]
    try:
        with parsing(repo):
            files = needed(names, lambda index: read_json(hf_hub_download(repo, index, revision=revision)))
        if any(name.endswith(".safetensors") for name in files):
            return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{repo} {explain(error)}") from None
    if any(name.endswith(f"{STEM}.bin") for name in names):
        raise BadInput(f"{repo} has only pickled weights, which can run code: convert them once, by "
                       f"`{CONVERT.format('DiffusionPipeline', 'from_pretrained', repo)}`, then --teacher DIR")
    raise BadInput(f"{repo} has no weights in safetensors in the diffusers layout")


def needed(names, read):
    """Which of a repository's files a teacher or a student is made of. `read`: see choose_weights."""
    files = [name for name in names if name.count("/") < 2 and name.endswith(SMALL)]
    for stem in (STEM, f"unet/{STEM}", f"vae/{STEM}", f"student/{STEM}", "text_encoder/model"):
        files += choose_weights(names, stem, read)          # by stem: some repositories also have all in one file
    return files


def explain(error):
    """What went wrong at the hub, and what to do, in a clause."""
    if isinstance(error, errors.LocalEntryNotFoundError):           # its cause says why the hub was not asked
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return "is gated: accept its licence on its page, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return "does not exist, or is private: check the spelling, or log in with `hf auth login`"
    if getattr(error, "errno", None) == 28 or "os error 28" in str(error):
        return "does not fit on this disk: make room, or set HF_HOME to a folder on another"
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return f"can't be had ({reason}): check the network and give the same command again, or a local folder"
