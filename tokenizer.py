"""CLIP's tokenizer (Radford et al. 2021): prompts to ids, by byte-pair encoding (Sennrich et al. 2016).

    tokenizer = Tokenizer.from_folder("tiny/tokenizer")
    ids = tokenizer(["a red fox", ""])              # (2, 77), int64: start, the prompt's tokens, end, padding

Equal to the reference, transformers' CLIPTokenizer, on all text that the Unicode of Python 3.11 knows.
"""

import json
import re
import unicodedata
import warnings
from pathlib import Path

import torch

# Vocabularies are written in visible characters, one for each byte: the one of Latin-1 or, where that is a blank or
# a control, one from 256 on.
VISIBLE = {byte: 256 + n for n, byte in enumerate([*range(33), *range(127, 161), 173])}

# CLIP's pattern has \p{L} for letters and \p{N} for numbers, which Python's re lacks. But re's \w is both of them
# and "_", and its \d is the decimal digits, so that only the other numbers, such as ½ and Ⅷ, have to be listed.
OTHER_NUMBERS = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c) in ("Nl", "No"))
WORD = re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{OTHER_NUMBERS}]+|[\d{OTHER_NUMBERS}]|[\W_]+")
PIECE = re.compile(rf"<\|startoftext\|>|<\|endoftext\|>|{WORD.pattern}")
CHUNK = re.compile(r"[\S\x1c-\x1f]+")   # Python takes these four controls for white space, the reference does not

# Text without the combining marks that came after Unicode 9. The reference composes by Unicode 9, which does not
# know them: it never moves them, and never composes a letter with another mark that stands behind one of them.
NO_NEW_MARK = re.compile(
    r"[^\u07fd\u0898-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1ace\u1df6-\u1dfa\ua82c"
    r"\U00010d24-\U00010f85\U00011070\U0001133b\U0001145e\U00011839-\U00011a99\U00011d42-\U00011d97"
    r"\U00016ff0-\U00016ff1\U0001e130-\U0001e2ef]+")

def normalize(text):
    """Composed (NFC) and lower-cased character by character: "ΟΣ".lower() ends in ς, the reference's in σ."""
    composed = NO_NEW_MARK.sub(lambda match: unicodedata.normalize("NFC", match[0]), text)
    return "".join(map(str.lower, composed))

def cut(text, tokens):
    """The parts of a text: the tokens that are written in it and what is between them."""
    return re.split("(" + "|".join(map(re.escape, tokens)) + ")", text) if tokens else [text]

def merge(word, rank):
    """Byte-pair encoding: merge the pair of lowest rank, everywhere from left to right, until no pair has a rank.
    word: str of visible characters; rank: (str, str) -> int. Returns its parts, a list of str. The parts are a
    linked list, and places has each rank's pairs, so that a merge does not scan the word: a megabyte takes seconds."""
    parts = [*word[:-1], word[-1] + "</w>", ""]         # a last, empty part, which is in no pair, ends the list
    before = [len(word), *range(len(word))]
    after = [*range(1, len(word) + 1), 0]
    places = {}                                         # rank -> where the pair of this rank begins
    for i, pair in enumerate(zip(parts, parts[1:])):
        if pair in rank:
            places.setdefault(rank[pair], []).append(i)
    while places:
        lowest = min(places)
        for i in sorted(places.pop(lowest)):
            j = after[i]
            if rank.get((parts[i], parts[j])) != lowest:            # one of the two has been merged since
                continue
            parts[i] += parts[j]
            parts[j] = ""
            after[i] = after[j]
            before[after[j]] = i
            for left in (before[i], i):
                pair = parts[left], parts[after[left]]
                if pair in rank:
                    places.setdefault(rank[pair], []).append(left)
    return [part for part in parts if part]

def read(path, parse):
    """The file's text, parsed. Raises ValueError, with the file's name, if it is missing or broken."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the tokenizer file {path}: {error}") from error

class Tokenizer:
    """B prompts -> ids (B, length), int64. Special tokens that are written in a prompt count as such.
    A prompt that is too long is cut, with a warning that shows its text from the cut on. vocab: token -> id; merges:
    pairs of tokens, by rank; config: tokenizer_config.json, updated with special_tokens_map.json. Raises ValueError
    if vocab lacks one of their tokens."""

    def __init__(self, vocab, merges, config):
        added = config.get("added_tokens_decoder", {})              # id -> token, in newer folders
        self.vocab = vocab | {token["content"]: int(i) for i, token in added.items()}
        self.rank = {pair: rank for rank, pair in enumerate(merges)}
        self.length = config.get("model_max_length", 77)
        self.cache = {}                                             # chunk -> ids, as prompts repeat their words

        special = [config.get("bos_token") or "<|startoftext|>"]
        special += [config.get(name) or "<|endoftext|>" for name in ("eos_token", "unk_token", "pad_token")]
        special = [{"content": token} if isinstance(token, str) else token for token in special]
        for token in [token["content"] for token in special] + ["".join(pair) for pair in merges]:
            if token not in self.vocab:
                raise ValueError(f"the tokenizer's files don't belong together: vocab.json has no {token!r}")
        self.start, self.end, self.unknown, self.pad = (self.vocab[token["content"]] for token in special)

        # A special token is looked for in the prompt as it is written or, if its entry says so, normalized.
        normalized = {token["content"]: token.get("normalized", False) for token in added.values() or special}
        self.exact = {token: self.vocab[token] for token in normalized if not normalized[token]}
        self.loose = {normalize(token): self.vocab[token] for token in normalized if normalized[token]}

    @classmethod
    def from_folder(cls, folder):
        """From vocab.json, merges.txt, tokenizer_config.json and, if there, special_tokens_map.json, which wins
        (SD 2.1 pads with "!"). Raises ValueError, with the file's name, if one is missing or broken."""
        folder = Path(folder)
        config = read(folder / "tokenizer_config.json", json.loads)
        if "added_tokens_decoder" not in config and (folder / "special_tokens_map.json").exists():
            config |= read(folder / "special_tokens_map.json", json.loads)
        lines = read(folder / "merges.txt", str.splitlines)
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        return cls(read(folder / "vocab.json", json.loads), merges, config)

    def __call__(self, prompts):
        rows = []
        for prompt in prompts:
            # Half a surrogate pair, which UTF-8 cannot write, becomes the replacement character U+FFFD.
            prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = [self.start]
            for chunk in CHUNK.finditer(prompt):
                ids += self.encode(chunk[0])
                if len(ids) >= self.length:
                    warnings.warn(f"prompt cut to {self.length} tokens, at: {prompt[chunk.start():]}", stacklevel=2)
                    break
            ids = ids[:self.length - 1] + [self.end]
            rows.append(ids + [self.pad] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)           # (B, length)

    def encode(self, chunk):
        """The ids, a list of int, of text without white space."""
        if chunk in self.cache:
            return self.cache[chunk]
        ids = []
        for part in cut(chunk, self.exact):
            if part in self.exact:
                ids.append(self.exact[part])
                continue
            for text in cut(normalize(part), self.loose):
                if text in self.loose:
                    ids.append(self.loose[text])
                    continue
                # PIECE, like the reference, isolates "<|endoftext|>" in ordinary text, too; WORD then splits it.
                for piece in PIECE.findall(text):
                    for word in WORD.findall(piece):
                        visible = word.encode().decode("latin-1").translate(VISIBLE)
                        ids += [self.vocab.get(token, self.unknown) for token in merge(visible, self.rank)]
        self.cache[chunk] = ids
        return ids
