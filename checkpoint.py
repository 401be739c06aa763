"""Files in and out: errors that a person can mend, JSON, atomic writes, strict loading of safetensors, the hub.

    folder, spec = resolve("sd21")                          # a name, a hub id or a folder -> a local folder
    unet = load_module(UNet, folder / "unet", "cuda", torch.bfloat16)
    write_json("runs/mine/config.json", {"lr": 1e-5})       # a crash at any moment leaves the old file whole
"""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import sys
import warnings
from pathlib import Path
from urllib.parse import unquote

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open

TINY = Path(__file__).resolve().parent / "tiny"
EMBEDDED = {"tiny": TINY, "tiny-pixel": TINY / "pixel"}     # the teachers that come with this code
STEM = "diffusion_pytorch_model"                            # the published name of U-Net and VAE weights
WEIGHTS = f"{STEM}.safetensors"
FLOAT32 = ("conv_norm_out.", "conv_out.")                   # the U-Net's last layers, see signal_ode.clean_prediction

class BadInput(ValueError):
    """What the person at the keyboard can put right: one sentence, and exit code 2 from every command."""

class Stream:
    """stdout or stderr that never stops the work: it escapes what its encoding lacks (an emoji in cp1252), and goes on
    in silence where nobody can read it any more (`| head -1`, a closed terminal)."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")     # None if it was closed from the start
        with contextlib.suppress(AttributeError):           # not every replacement is a file
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, action, *args):
        try:
            return action(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)

def command(main):
    """Run the main() of a command: a BadInput is one line and exit code 2, a warning is one line."""
    with contextlib.redirect_stdout(Stream(sys.stdout)), contextlib.redirect_stderr(Stream(sys.stderr)):
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            main()
        except (BadInput, OSError) as error:
            sys.exit(fail(str(error)))
        except RuntimeError as error:                       # CUDA has a class for out of memory, the CPU has not
            if not isinstance(error, torch.cuda.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            reason = str(error).split(". ")[0]
            sys.exit(fail(f"out of memory, give half the --micro-batch, or --batch ({reason})"))
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            sys.stdout.flush()

def fail(message):
    """Say what is wrong, on one line, and return the exit code."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2

def require(good, where, key, value, supported):
    """Raise BadInput, naming the file, the key of its config and the value, unless it is good."""
    if not good:
        raise BadInput(f"{where}: {key} = {repr(value)[:80]} is not supported: {supported}")

@contextlib.contextmanager
def parsing(where):
    """What goes wrong while somebody's file is taken apart is a BadInput that begins with `where`, its name."""
    try:
        yield
    except BadInput:
        raise
    except KeyError as error:
        raise BadInput(f"{where} has no {error}") from None
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError) as error:
        raise BadInput(f"{where}: {error}") from None

def read_json(path, kind=dict):
    """The value in a JSON file, which must be of this kind. Raises BadInput."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(value, kind):
        raise BadInput(f"{path} holds a {type(value).__name__}, not a {kind.__name__}")
    return value

def write_file(path, write):
    """Call write(temporary path), flush to disk, rename: a crash at any moment leaves the old file whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode                     # safetensors would let nobody but the owner read it
        write(temporary)
        with contextlib.suppress(OSError):
            temporary.chmod(mode)
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)               # a full disk gets its space back
        raise BadInput(f"can't write {path}: {getattr(error, 'strerror', None) or error}") from None

def flush_to_disk(path):
    """fsync, where the file system knows it."""
    with open(path, "r+b") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise

def write_json(path, value):
    """Write a value as JSON, atomically. Raises BadInput."""
    write_file(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))

# ------------------------------------------------------------------------------------------------------- weights
@contextlib.contextmanager
def open_tensors(path):
    """safetensors' safe_open. What is wrong with the file is a BadInput."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a whole safetensors file: {error}") from None

def weight_names(file):
    """The names of an open file's weights, without the position_ids that old text encoders store beside them."""
    return [name for name in file.keys() if not name.endswith("position_ids")]

def read_tensors(paths, device="cpu", dtype=None):
    """({name: tensor}, metadata) of one safetensors file or several, on the device, in dtype (None: as stored).
    With a dtype of half precision, the layers named in FLOAT32 are in float32 all the same. On the CPU, in the file's
    own dtype, a tensor is a view of the memory-mapped file, which costs no memory until it is read."""
    tensors, metadata = {}, {}
    half = dtype in (torch.float16, torch.bfloat16)
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        with open_tensors(path) as file:
            names = weight_names(file)
            metadata |= file.metadata() or {}
        while names:
            with open_tensors(path) as file:    # reopened every 128 MB, to release the pages that were read of it
                copied = 0
                while names and copied < 2**27:
                    name = names.pop()
                    stored = file.get_tensor(name)
                    if not stored.is_floating_point():
                        raise BadInput(f"{path}: {name} is {stored.dtype}, but weights are floating-point")
                    tensors[name] = stored.to(device, torch.float32 if half and name.startswith(FLOAT32) else dtype)
                    if tensors[name] is not stored:
                        copied += stored.nbytes
    return tensors, metadata

# The attention layers' names before diffusers 0.12, and today's
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

def modern(name):
    """The name that our networks give to a published parameter: diffusers' present name, if it has an old one."""
    if re.match(r"(embeddings|encoder\.layers\.\d+\.(layer_norm\d|self_attn|mlp)|final_layer_norm)\.", name):
        return f"text_model.{name}"                         # transformers 5 leaves the first part out
    if ".attentions." not in name:
        return name
    module, layer, kind = name.rsplit(".", 2)
    return f"{module}.{OLD_NAMES.get(layer, layer)}.{kind}"

def blank(network, config, where):
    """network(config) on the meta device, without weights. Raises BadInput; `where` names the file in it."""
    try:
        with torch.device("meta"):
            return network(config)
    except KeyError as error:
        raise BadInput(f"{where}: the config has no {error}") from None
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"{where}: {error}") from None

def build(network, config, tensors, where):
    """network(config), frozen, made of exactly these tensors, which are not copied. Raises BadInput naming the
    config's key, or the missing, unexpected or mis-shaped tensors; `where` names the file in its message."""
    module = blank(network, config, where)
    tensors = {modern(name): tensor for name, tensor in tensors.items()}
    expected = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = [f"missing {n}" for n in expected if n not in shapes]
    wrong += [f"unexpected {n}" for n in shapes if n not in expected]
    wrong += [f"{n} is {shapes[n]}, not {expected[n]}" for n in expected if shapes.get(n, expected[n]) != expected[n]]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise BadInput(f"{where} does not hold the weights its config describes: {'; '.join(wrong[:8])}{more}")
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)

def choose_weights(names, stem):
    """Which of the file names hold the weights called stem: the whole file, its shards, or those in fp16."""
    for variant in ("", ".fp16"):
        whole = rf"{re.escape(stem + variant)}\.safetensors"
        shard = rf"{re.escape(stem)}(?:{re.escape(variant)})?-\d+-of-\d+(?:{re.escape(variant)})?\.safetensors"
        for pattern in (whole, shard):
            if found := sorted(name for name in names if re.fullmatch(pattern, name)):
                return found
    return []

def weight_files(folder, stem=STEM):
    """The safetensors files of a folder that hold its weights, one or several shards. Raises BadInput."""
    names = [path.name for path in folder.glob("*")]
    if chosen := choose_weights(names, stem):
        return [folder / name for name in chosen]
    pickled = [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
    refused = f" ({', '.join(pickled)} is a pickle, which can run code, and is refused)" if pickled else ""
    raise BadInput(f"{folder / stem}.safetensors is missing{refused}")

def load_module(network, folder, device, dtype, stem=STEM):
    """A network, frozen, from its folder of config.json and weights. Raises BadInput."""
    config, files = read_json(folder / "config.json"), weight_files(folder, stem)
    return build(network, config, read_tensors(files, device, dtype)[0], files[0])

# ------------------------------------------------------------------------------------------------------- the hub
# name -> its repositories, tried in order (Stability removed its own), and the sha256 of its parts' weights
HUB = read_json(Path(__file__).parent / "hub.json")

def is_embedded(spec):
    """Whether spec, a name or a folder, is a teacher that comes with this code."""
    return str(spec).rstrip("/") in EMBEDDED or Path(spec).resolve() in EMBEDDED.values()

def last_name(spec):
    """What a run is called by default: the last part of its teacher's name, hub id or folder."""
    url = HUB_URL.fullmatch(spec)
    return Path((url["repo"] if url else spec).partition("@")[0]).resolve().name

def resolve(spec):
    """(folder, spec) of a name, a hub id or address, or a folder; a name or an id may end in @REVISION. The spec
    returned means the same from any working directory. Raises BadInput, one sentence."""
    spec = str(spec)
    if spec.endswith("/") and Path(spec).is_dir():          # a folder, even if it has the name of a teacher
        return find(spec)
    spec = spec.rstrip("/")
    if spec in EMBEDDED:
        return EMBEDDED[spec], spec
    if spec.partition("@")[0] in HUB:
        return fetch_named(spec), spec
    return find(spec, f"a name ({', '.join([*EMBEDDED, *HUB])}), nor ")

CONVERT = "python -c \"from diffusers import {} as P; P.{}('{}').save_pretrained('DIR')\""

# What may stand for a hub repository: OWNER/NAME, OWNER/NAME@REVISION, or the address of one of its pages
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>.+))?")
HUB_URL = re.compile(rf"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)|{re.escape(ENDPOINT)})/"
                     r"(?P<repo>\w[\w.-]*/[\w.-]+)(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+))?(?:[/?#].*)?")

def find(spec, name=""):
    """(folder, spec) of a folder or, fetched, of a hub repository. The spec returned means the same from any working
    directory. name: what else it might have been, for the message. Raises BadInput, one sentence."""
    path, url = Path(spec).expanduser(), HUB_URL.fullmatch(str(spec))
    if path.is_dir():
        return path, str(path.resolve())
    if path.suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth"):
        convert = CONVERT.format("StableDiffusionPipeline", "from_single_file", spec)
        raise BadInput(f"{spec} is one file, not a folder: give the one in which it lies or, if it is a whole model, "
                       f"convert it once, by `{convert}`, then give DIR")
    others = {known: known for known in (*EMBEDDED, *HUB) if name}
    others |= {other.name: other for other in path.parent.glob("*")}
    near = difflib.get_close_matches(path.name, others, 1)
    hint = f" (did you mean {others[near[0]]}?)" if near else ""
    found = url or HUB_ID.fullmatch(str(spec).rstrip("/"))
    if not found:
        raise BadInput(f"{spec!r} is neither {name}a folder{hint}, nor a hub id")
    if not url and path.parent.is_dir():
        raise BadInput(f"{spec} does not exist, though {path.parent} is a folder here{hint}; if the hub's {spec} is "
                       f"meant, give its address, {ENDPOINT}/{spec}")
    repo, revision = found["repo"], found["revision"] and unquote(found["revision"])
    try:
        return fetch(repo, revision), str(spec).rstrip("/")
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
    files = needed(names)
    if not any(name.endswith(".safetensors") for name in files):
        if any(name.endswith(f"{STEM}.bin") for name in names):
            raise BadInput(f"{repo} has only pickled weights, which can run code: convert them once, by "
                           f"`{CONVERT.format('DiffusionPipeline', 'from_pretrained', repo)}`, then --teacher DIR")
        raise BadInput(f"{repo} has no weights in safetensors in the diffusers layout")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except Exception as error:
        raise BadInput(f"{repo} {explain(error)}") from None

# The files beside the weights of which a teacher or a student is made
SMALL = ("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json", "tokenizer.json",
         "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "student.json", "prompts.txt")

def needed(names):
    """Which of a repository's files a teacher or a student is made of."""
    files = [name for name in names if name.count("/") < 2 and name.rpartition("/")[2] in SMALL]
    for part in ("", "unet/", "vae/", "student/"):          # by stem: some repositories also have all in one file
        files += choose_weights(names, part + STEM)
    return files + choose_weights(names, "text_encoder/model")

def explain(error):
    """What went wrong at the hub, and what to do, in a clause."""
    if isinstance(error, hub_errors.LocalEntryNotFoundError):       # its cause says why the hub was not asked
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub_errors.GatedRepoError) or status == 403:
        return "is gated: accept its licence on its page, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, hub_errors.RepositoryNotFoundError) or status in (401, 404):
        return "does not exist, or is private: check the spelling, or log in with `hf auth login`"
    if getattr(error, "errno", None) == 28 or "os error 28" in str(error):
        return "does not fit on this disk: make room, or set HF_HOME to a folder on another"
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return f"can't be had ({reason}): check the network and give the same command again, or a local folder"

def check_weights(repo, folder, sha256):
    """Check that a named teacher's weights are as published; delete them from the cache if not. Raises BadInput.
    sha256: part ("unet", ...) -> the hash of its weights, if they are a single file; that of shards isn't known."""
    for part, expected in sha256.items():
        path = folder / part / ("model.safetensors" if part == "text_encoder" else WEIGHTS)
        if path.exists() and (found := hash_once(path)) != expected:
            for file in (path.resolve(), path):             # the cache's copy, and the link to it
                file.unlink(missing_ok=True)
            raise BadInput(f"{repo} has another {part}/{path.name} than published (sha256 {found[:12]}, not "
                           f"{expected[:12]}), which was deleted again")

def hash_once(path):
    """The sha256 of a file in the hub's cache, computed once: a stamp beside the file keeps it for later starts, as
    long as the file has the same size and time of change. Processes that start together wait for the first one."""
    file = path.resolve()
    stamp, status = file.with_name(file.name + ".sha256"), file.stat()
    writable = os.access(file.parent, os.W_OK)              # if not, every start computes it
    with WeakFileLock(f"{stamp}.lock") if writable else contextlib.nullcontext():
        known = stamp.read_text().split() if stamp.exists() else []
        if known[1:] == [str(status.st_size), str(status.st_mtime_ns)]:
            return known[0]
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if writable:
            write_file(stamp, lambda p: p.write_text(f"{found} {status.st_size} {status.st_mtime_ns}\n"))
    return found
