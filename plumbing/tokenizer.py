"""CLIP's tokenizer (Radford et al. 2021): prompts to ids, by byte-pair encoding (Sennrich et al. 2016).

    tokenizer = Tokenizer.from_folder("tiny/tokenizer")
    ids = tokenizer(["a red fox", ""])              # (2, 77), int64: start, the prompt's tokens, end, padding

Equal to the reference, transformers' CLIPTokenizer, on all text that the Unicode of Python 3.11 knows.
"""

import functools
import re
import unicodedata
import warnings
from pathlib import Path

import torch

from plumbing.files import read_json, read_text

# Vocabularies are written in visible characters, one for each byte: the one of Latin-1 or, where that is a blank or
# a control, one from 256 on.
VISIBLE = {byte: 256 + n for n, byte in enumerate([*range(33), *range(127, 161), 173])}

# CLIP's pattern has \p{L} for letters and \p{N} for numbers, which Python's re lacks. But re's \w is both of them
# and "_", and its \d is the decimal digits. Only the other numbers, such as ½ and Ⅷ, have to be listed.
OTHER_NUMBERS = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c) in ("Nl", "No"))
WORD = re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{OTHER_NUMBERS}]+|[\d{OTHER_NUMBERS}]|[\W_]+")
PIECE = re.compile(rf"<\|startoftext\|>|<\|endoftext\|>|{WORD.pattern}")
BLANKS = re.compile(r"[^\S\x1c-\x1f]+")  # Python takes these four controls for white space, the reference does not
CHUNK = re.compile(r"[\S\x1c-\x1f]+")
WHOLE = re.compile(r".+", re.DOTALL)    # a chunk is the whole text where an added token holds a blank

# Text without the combining marks that came after Unicode 9. The reference composes by Unicode 9, which does not
# know them: it never moves them, and never composes a letter with another mark that stands behind one of them.
NO_NEW_MARK = re.compile(
    r"[^\u07fd\u0898-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1ace\u1df6-\u1dfa\ua82c"
    r"\U00010d24-\U00010f85\U00011070\U0001133b\U0001145e\U00011839-\U00011a99\U00011d42-\U00011d97"
    r"\U00016ff0-\U00016ff1\U0001e130-\U0001e2ef]+")


def normalize(text):
    """Composed (NFC), with one space for blanks, lower-cased a character at a time: "ΟΣ".lower() has ς, CLIP σ."""
    composed = NO_NEW_MARK.sub(lambda match: unicodedata.normalize("NFC", match[0]), text)
    return "".join(map(str.lower, BLANKS.sub(" ", composed)))


def split_at(text, tokens):
    """The parts of a text: the tokens that are written in it, of those that begin alike the longest, and the rest."""
    longest = sorted(tokens, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest)) + ")", text) if tokens else [text]


def merge(word, rank):
    """Byte-pair encoding of a word, a str of visible characters: its parts, a list of str. The pair of lowest rank is
    merged, everywhere from left to right, until no pair has a rank. `rank`: {(str, str): int}."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        lowest = min(zip(parts, parts[1:]), key=lambda pair: rank.get(pair, float("inf")))
        if lowest not in rank:
            break
        parts = join(parts, lowest)
    return parts


def join(parts, pair):
    """The parts with every such pair of neighbours made one, from left to right."""
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


NAMED = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
         "pad_token": "<|endoftext|>"}


def special_tokens(config):
    """The entries {"content": str, ...} of the tokens that a config names: those of NAMED, then any others."""
    others = [name for name in config if name.endswith("_token") and name not in NAMED]
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    tokens = [*(config.get(name) or NAMED[name] for name in NAMED), *(config[name] for name in others), *more]
    tokens = [{"content": token} if isinstance(token, str) else token for token in tokens]
    return [{**token, "special": True} for token in tokens if isinstance(token, dict)]      # not add_bos_token: true


class Tokenizer:
    """B prompts -> ids (B, length), int64. Special and added tokens that are written in a prompt count as such.
    A prompt that is too long is cut, with a warning that shows what was cut. `vocab`: token -> id; `merges`: pairs of
    tokens, by rank; `config`: tokenizer_config.json with everything that its folder says of special and added tokens.
    Raises ValueError if they don't belong together."""

    def __init__(self, vocab, merges, config):
        self.vocab = dict(vocab)
        if any(type(number) is not int for number in vocab.values()):
            raise ValueError("the vocabulary has ids that are no whole numbers")
        self.rank = {pair: rank for rank, pair in enumerate(merges)}
        self.length = config.get("model_max_length", 77)
        if type(self.length) is not int or self.length < 2:
            raise ValueError(f"model_max_length {self.length!r} is not supported: a whole number from 2")
        self.encode = functools.cache(self.encode)                  # prompts repeat their words

        added = {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
        special = special_tokens(config)
        entries = {added[index]["content"]: added[index] for index in sorted(added)}
        for token in [token["content"] for token in special[:len(NAMED)]] + ["".join(pair) for pair in merges]:
            if token not in vocab and token not in entries:
                raise ValueError(f"the tokenizer's files don't belong together: vocab.json has no {token!r}")
        entries |= {token["content"]: token for token in special if token["content"] not in entries}
        for token in entries:
            self.vocab.setdefault(token, len(self.vocab))           # new ones are numbered as the reference does
        numbers = {token["content"]: index for index, token in added.items()}
        for name, token in entries.items():
            number, wanted = numbers.get(name, self.vocab[name]), self.vocab[name]
            if number != wanted or token.get("single_word") or name != name.strip():
                raise ValueError(f"the added token {name!r}, number {number}, is not supported: its number must be "
                                 f"{wanted}, it must not be single_word nor have blanks at its ends")
        made = {"".join(pair) for pair in merges} | entries.keys()
        if lost := [token for token in vocab if token not in made and len(token.removesuffix("</w>")) > 1]:
            warnings.warn(f"no merge makes {len(lost)} of the {len(vocab)} tokens of the vocabulary, such as "
                          f"{lost[0]!r}: are the merges whole?", stacklevel=2)
        self.start, self.end, self.unknown, self.pad = (self.vocab[token["content"]] for token in special[:len(NAMED)])

        # A token is looked for in the prompt as it is written or, if its entry says so, normalized.
        normalized = {name: token.get("normalized", not token.get("special")) for name, token in entries.items()}
        self.exact = {token: self.vocab[token] for token in normalized if not normalized[token]}
        self.loose = {normalize(token): self.vocab[token] for token in normalized if normalized[token]}
        self.chunk = WHOLE if any(re.search(r"\s", token) for token in entries) else CHUNK

    @classmethod
    def from_folder(cls, folder):
        """From tokenizer_config.json and either tokenizer.json, which transformers 5 writes, or vocab.json, merges.txt.
        Where the config has no added_tokens_decoder, special_tokens_map.json (SD 2.1 pads with "!"),
        added_tokens.json and tokenizer.json say what it lacks, as they do to the reference, if they are there.
        Raises BadInput, with the file's name, if a file is missing or broken."""
        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        whole = read_json(folder / "tokenizer.json", default={})
        if whole:
            vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
        else:
            vocab, merges = read_json(folder / "vocab.json"), read_text(folder / "merges.txt").split("\n")
            merges = [line for line in merges if line.strip() and not line.startswith("#version")]
        merges = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]
        if "added_tokens_decoder" not in config:
            if not config.get("extra_special_tokens"):
                config["extra_special_tokens"] = config.pop("additional_special_tokens", None)
            config |= read_json(folder / "special_tokens_map.json", default={})
            # Here the reference takes additional_special_tokens for ordinary ones, if special_tokens_map.json has them.
            special = {token["content"] for token in special_tokens({**config, "additional_special_tokens": None})}
            added = {index: {"content": token, "special": token in special}
                     for token, index in read_json(folder / "added_tokens.json", default={}).items()}
            added |= {token["id"]: token for token in whole.get("added_tokens", [])}
            config["added_tokens_decoder"] = added
        return cls(vocab, merges, config)

    def __call__(self, prompts):
        rows = []
        for prompt in prompts:
            # Half a surrogate pair, which UTF-8 cannot write, becomes the replacement character U+FFFD.
            prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = [self.start]
            for chunk in self.chunk.finditer(prompt):
                ids += self.encode(chunk[0])
                if len(ids) >= self.length:
                    rest = prompt[chunk.start():]
                    shown = rest if len(rest) <= 80 else f"{rest[:80]}..."
                    warnings.warn(f"prompt truncated to {self.length} tokens, at: {shown}", stacklevel=2)
                    break
            ids = ids[:self.length - 1] + [self.end]
            rows.append(ids + [self.pad] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)           # (B, length)

    def encode(self, chunk):
        """The ids, a list of int, of a chunk of text."""
        ids = []
        for part in split_at(chunk, self.exact):
            if part in self.exact:
                ids.append(self.exact[part])
                continue
            for text in split_at(normalize(part), self.loose):
                if text in self.loose:
                    ids.append(self.loose[text])
                    continue
                # PIECE, like the reference, isolates "<|endoftext|>" in ordinary text, too; WORD then splits it.
                pieces = (piece for part in CHUNK.findall(text) for piece in PIECE.findall(part))
                for word in (word for piece in pieces for word in WORD.findall(piece)):
                    visible = word.encode().decode("latin-1").translate(VISIBLE)
                    ids += [self.vocab.get(token, self.unknown) for token in merge(visible, self.rank)]
        return ids
