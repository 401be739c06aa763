"""A frozen teacher from a name or folder: configs, weights, tokenizer, guidance, decoding; students on disk.

    teacher = load_teacher("tiny")
    cond = teacher.encode(["a red ankle boot on a yellow background"])
    f = teacher.denoise(x_t, t, cond, w=3.0)                the clean prediction that BOOT learns from
    images = teacher.decode(f)

    student = load_student("runs/tiny")
    images = student.teacher.decode(student(eps, 0, cond))
"""

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
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import VAE, TextEncoder, UNet
from signal_ode import Schedule, clean_prediction, guide, solve, student_signal

TINY = Path(__file__).parent / "tiny"
NAMED = {"tiny": TINY}


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


def pick_device(name=None):
    """The device of --device; None is CUDA if there is one, else CPU. Under torchrun, this process's GPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name} is not available here ({reason}): try cpu") from None
    return device


# ----------------------------------------------------------------------------------------------------- files

def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} can't be read as JSON: {error}") from None


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


def read_tensors(path, device="cpu", dtype=None):
    """({name: tensor}, metadata) of a safetensors file, one by one to device and dtype (but see FLOAT32)."""
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not name.endswith("position_ids")]  # those are no weight
            dtypes = {name: torch.float32 if dtype and name.startswith(FLOAT32) else dtype for name in names}
            tensors = {name: file.get_tensor(name).to(device, dtypes[name]) for name in names}
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        suffixes = (".bin", ".ckpt", ".pt", ".pth")
        pickled = [p.name for p in Path(path).parent.glob("*") if p.suffix in suffixes]
        refused = f" ({', '.join(pickled)} is a pickle, which can run code, and is refused)"
        raise BadInput(f"{path} is missing{refused if pickled else ''}") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a whole safetensors file: {error}") from None


# attention before diffusers 0.12
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern(name):
    """A parameter's present name."""
    if ".attentions." not in name:
        return name
    module, layer, kind = name.rsplit(".", 2)
    return f"{module}.{OLD_NAMES.get(layer, layer)}.{kind}"


def build(network, config, tensors, where):
    """network(config), frozen, with exactly these weights; on the meta device first, so none is made twice.

    Raises BadInput naming the config key, or the missing, unexpected or mis-shaped tensors. where: said in
    the error.
    """
    try:
        with torch.device("meta"):
            module = network(config)
    except KeyError as error:
        raise BadInput(f"{where}: the config has no {error}") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"{where}: {error}") from None
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
    return module.eval().requires_grad_(False).to(memory_format=torch.channels_last)


WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_module(network, folder, device, dtype, name=WEIGHTS):
    """A network from its folder: config.json and weights."""
    config = read_json(folder / "config.json")
    tensors, _ = read_tensors(folder / name, device, dtype)
    return build(network, config, tensors, folder / name)


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
# Merges are written in visible characters, one for each byte: a byte without a visible one gets one beyond
# Latin-1.
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

        # A special token is looked for in the prompt as written or, if its entry says so, normalized: in any
        # case.
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


# --------------------------------------------------------------------------------------------------- teacher

def load_teacher(spec="tiny", device="cpu", dtype=torch.float32):
    """The frozen teacher of a name or of a folder in the diffusers layout. Raises BadInput, one sentence."""
    folder = NAMED.get(str(spec), Path(spec))
    if not folder.is_dir():
        raise BadInput(f"teacher {str(spec)!r} is neither a name ({', '.join(NAMED)}) nor a folder")
    return Teacher(folder, str(spec) if str(spec) in NAMED else str(folder.resolve()), device, dtype)


class Teacher:
    """A text-to-image latent diffusion model, frozen.

    .schedule: Schedule. .shape: of one latent, (4, h, w). .unet, .vae, .text_encoder, .tokenizer: its parts.
    .uncond: the empty prompt's embedding, (1, 77, D). .spec: what load_teacher takes again. .fingerprint:
    tells teachers apart.
    """

    def __init__(self, folder, spec, device, dtype):
        self.folder, self.spec, self.device = folder, spec, torch.device(device)
        scheduler = folder / "scheduler" / "scheduler_config.json"
        try:
            self.schedule = Schedule(read_json(scheduler))
        except ValueError as error:
            raise BadInput(f"{scheduler}: {error}") from None
        try:
            self.tokenizer = Tokenizer.from_folder(folder / "tokenizer")
        except ValueError as error:
            raise BadInput(str(error)) from None
        self.unet = load_module(UNet, folder / "unet", device, dtype)
        self.vae = load_module(VAE, folder / "vae", device, dtype)
        self.text_encoder = load_module(TextEncoder, folder / "text_encoder", device, dtype,
                                        "model.safetensors")
        config, width = self.unet.config, self.text_encoder.config["hidden_size"]
        classes, size = config.get("class_embed_type"), config.get("sample_size")
        if classes or not isinstance(size, int) or config["cross_attention_dim"] != width:
            where = folder / "unet" / "config.json"
            raise BadInput(f"{where}: a teacher has no class_embed_type, an integer sample_size, and the "
                           f"text encoder's width {width} as cross_attention_dim")
        self.shape = (config["in_channels"], size, size)
        self.fingerprint = fingerprint(folder / "unet" / WEIGHTS, self.schedule)
        self.uncond = self.encode([""])

    @torch.no_grad()
    def encode(self, prompts):
        """Text embeddings (B, 77, D) of B prompts."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.no_grad()
    def denoise(self, x_t, t, cond, w=1.0, uncond=None):
        """f_w(x_t, t), the clean prediction after guidance, float32 (B, 4, h, w).

        t: int or (B,), 1..T. w: float or (B,); 1 is no guidance, and one pass instead of two. uncond:
        embeddings of a negative prompt, (1, 77, D); None is the empty prompt.
        """
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        if not torch.is_tensor(w) and w == 1:
            return clean_prediction(self.unet(x_t, t - 1, cond), x_t, t, self.schedule)
        uncond = (self.uncond if uncond is None else uncond).expand_as(cond)
        out = self.unet(torch.cat([x_t, x_t]), torch.cat([t, t]) - 1, torch.cat([cond, uncond]))
        f_cond, f_uncond = (clean_prediction(o, x_t, t, self.schedule) for o in out.chunk(2))
        return guide(f_cond, f_uncond, w)

    @torch.no_grad()
    def decode(self, latents):
        """Images (B, 3, H, W) in [-1, 1], float32."""
        return self.vae.decode(latents.to(memory_format=torch.channels_last)).float().clamp(-1, 1)


def fingerprint(path, schedule):
    """A short hash of schedule and some weights, to tell teachers apart; the same in half precision."""
    alphas = schedule.alpha(torch.arange(schedule.T + 1)).mul(1e6).round().tolist()
    digest = hashlib.sha256(f"{schedule.prediction} {alphas}".encode())
    with safe_open(path, "pt") as file:
        for name in ("conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight"):
            digest.update(file.get_tensor(name).half().numpy().tobytes())
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
        self.uncond = teacher.encode([negative_prompt])     # what its guidance leads away from, (1, 77, D)

    def __call__(self, eps, t, cond, w=None):
        """The signal y_t (B, 4, h, w) of noise eps at target times t, int or (B,), 0..T; 0 is the clean end.

        w: float or (B,), needed by a student of a range of guidance scales, and without effect on another.
        """
        t = torch.as_tensor(t, device=eps.device).expand(len(eps))
        w = torch.as_tensor(w, device=eps.device).expand(len(eps)) if self.ranged else None

        def network(x_i, i, t):
            index = torch.full((len(x_i),), i - 1, device=x_i.device)
            return self.network(x_i, index, cond, target=t, guidance=w)
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
    ranged, path = isinstance(guidance, list), teacher.folder / "unet" / WEIGHTS
    config = dict(teacher.unet.config, class_embed_type="timestep",
                  time_cond_proj_dim=256 if ranged else None)
    tensors, _ = read_tensors(path, teacher.device, torch.float32)
    for kind in ("weight", "bias"):
        first, last = (tensors[f"time_embedding.linear_{n}.{kind}"] for n in (1, 2))
        tensors[f"class_embedding.linear_1.{kind}"] = first.clone()
        tensors[f"class_embedding.linear_2.{kind}"] = torch.zeros_like(last)
    if ranged:
        width = config["block_out_channels"][0]
        tensors["time_embedding.cond_proj.weight"] = torch.zeros(width, 256, device=teacher.device)
    return Student(build(UNet, config, tensors, path), teacher, input_time, guidance, negative_prompt)


def save_student(folder, student, tensors=None, dtype=torch.float32):
    """Write a student, or `tensors` in its place (their average, say): config.json and weights that diffusers
    opens as they are, and student.json, what this code needs to call it."""
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
    """The student in a folder, or in its `student/` as train.py leaves it.

    teacher: a name or folder, replaces the one it names. Raises BadInput if the folder holds no student, or
    one of another teacher.
    """
    folder = Path(folder)
    folder = folder / "student" if (folder / "student" / "student.json").exists() else folder
    if not (folder / "student.json").exists():
        raise BadInput(f"{folder} holds no student (no student.json): give the folder that train.py wrote")
    info = read_json(folder / "student.json")
    if missing := {"teacher", "fingerprint", "input_time", "guidance", "negative_prompt"} - set(info):
        raise BadInput(f"{folder / 'student.json'} has no {', '.join(sorted(missing))}")
    try:
        teacher = load_teacher(teacher or info["teacher"], device, dtype)
    except BadInput as error:
        raise BadInput(f"{error} (the teacher of {folder}; --teacher says where it is now)") from None
    if info["fingerprint"] != teacher.fingerprint:
        raise BadInput(f"the student in {folder} was made for another teacher than {teacher.spec}: "
                       f"fingerprint {info['fingerprint']}, not {teacher.fingerprint}")
    network = load_module(UNet, folder, device, dtype)
    return Student(network, teacher, info["input_time"], info["guidance"], info["negative_prompt"])
