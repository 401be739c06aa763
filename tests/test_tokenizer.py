"""From a prompt file to token ids: the published ones and, if it is installed, the reference library's on all texts.

- Lines of a prompt file end at newlines only.
- Prompts get the published ids; padding, added tokens and ids are what a folder's files say, in every layout.
- A cut prompt warns with what was dropped; a missing or broken file is named.
- Any text, every character, and every layout of added tokens get the reference's ids.
"""

import random
import shutil
import unicodedata

import pytest
import torch

from conftest import CHECKPOINTS, TINY, edit, slow
from plumbing.files import read_json
from plumbing.prompts import compose_prompts, read_prompts
from plumbing.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:prompt truncated")
# All that Python 3.11 knows; a younger Python knows characters on which the libraries do not agree
database = unicodedata if unicodedata.unidata_version <= "14.0.0" else unicodedata.ucd_3_2_0
KNOWN = [chr(code) for code in range(0x110000) if database.category(chr(code)) not in ("Cn", "Cs")]
MARKS = [char for char in KNOWN if unicodedata.combining(char)]
COMPOSED = [char for char in KNOWN if unicodedata.decomposition(char)[:1] not in ("", "<")]


@pytest.fixture
def folder(tmp_path):
    """A function: "sd21-base", "sd15" or "tiny" -> a tokenizer folder that the test may change."""
    def make(name):
        sources = [CHECKPOINTS / "clip-tokenizer", CHECKPOINTS / name / "tokenizer"]
        for source in [TINY / "tokenizer"] if name == "tiny" else sources:
            shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        return tmp_path
    return make


def write_small(folder, **config):
    """A vocabulary of three letters, its ids in no familiar order."""
    vocab = ["ab</w>", "<end>", "a", "b", "c</w>", "<pad>", "b</w>", "ab", "abc</w>", "<begin>", "<unk>"]
    edit(folder / "vocab.json", **{token: i for i, token in enumerate(vocab)})
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c</w>\na b</w>\n", encoding="utf-8")
    tokens = {"bos_token": "<begin>", "eos_token": "<end>", "unk_token": "<unk>", "pad_token": "<pad>"}
    edit(folder / "tokenizer_config.json", **tokens | {"model_max_length": 8} | config)
    return folder


# ------------------------------------------------------------------------------------------------------ prompt files
def test_lines_of_a_prompt_file_end_at_newlines_only(tmp_path):
    prompts, path = ["a\u2028b", "c\x0bd\x0ce", "f\x1cg\x1dh\x1ei", "j\x85k", "l\u2029", "m"], tmp_path / "p.txt"
    path.write_bytes("\r\n".join([*prompts[:3], "", " \t", *prompts[3:]]).encode())
    assert read_prompts(path) == prompts


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.csv", "p.JSON"])
def test_comments_are_left_out_and_files_of_other_kinds_refused(tmp_path, name):
    (tmp_path / "p.txt").write_text("# a comment\na #1 fan\n  #b\n")
    assert read_prompts(tmp_path / "p.txt") == ["a #1 fan"]
    (tmp_path / name).write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=f"{name} is not read .*: give a plain text file, one prompt a line"):
        read_prompts(tmp_path / name)


# -------------------------------------------------------------------------------------------------- ids of the files
def test_prompts_get_the_published_ids(folder):
    golden = read_json(CHECKPOINTS / "clip-tokenizer" / "golden_ids.json", list)
    ids = Tokenizer.from_folder(folder("sd21-base"))([entry["prompt"] for entry in golden])
    assert ids.dtype == torch.int64 and ids.shape == (len(golden), 77)
    for entry, row in zip(golden, ids.tolist()):
        assert row == entry["sd2_ids"], entry["prompt"]


@pytest.mark.parametrize("name, pad", [("sd21-base", 0), ("sd15", 49407)])
def test_padding_is_what_special_tokens_map_says_or_else_the_config(folder, name, pad):
    path = folder(name)
    for pad in pad, 49407:
        ids = Tokenizer.from_folder(path)(["a cat", ""])
        assert ids.tolist() == [[49406, 320, 2368, 49407] + [pad] * 73, [49406, 49407] + [pad] * 75]
        (path / "special_tokens_map.json").unlink(missing_ok=True)


def test_no_id_is_built_in(tmp_path):
    tokenizer = Tokenizer.from_folder(write_small(tmp_path))
    assert tokenizer(["ABC ab<pad>b", "az"]).tolist() == [[9, 8, 0, 5, 6, 1, 5, 5], [9, 2, 10, 1, 5, 5, 5, 5]]
    assert tokenizer([]).shape == (0, 8)


@pytest.mark.parametrize("change", [{"single_word": True}, {"content": " Own"}, {"id": 12}])
def test_added_tokens_that_would_be_read_otherwise_are_refused(tmp_path, change):
    token = {"content": "<Own>", "id": 11, **change}
    added = {str(token.pop("id")): token}
    with pytest.raises(ValueError, match="the added token .*Own.* is not supported"):
        Tokenizer.from_folder(write_small(tmp_path, added_tokens_decoder=added))


def test_a_cut_prompt_warns_with_what_was_dropped(folder, recwarn):
    tokenizer, fits = Tokenizer.from_folder(folder("sd21-base")), " ".join(["cat"] * 75)
    whole = tokenizer([fits])
    assert not recwarn.list
    with pytest.warns(UserWarning, match="at: in the Style of Rembrandt$"):
        cut = tokenizer([fits + " in the Style of Rembrandt"])
    assert torch.equal(cut, whole)
    with pytest.warns(UserWarning, match=f"at: {'dog ' * 20}...$"):
        tokenizer([fits + " dog" * 1000])


def test_merges_that_are_cut_short_warn(folder):
    path = folder("sd15") / "merges.txt"
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:-100]), encoding="utf-8")
    with pytest.warns(UserWarning, match="no merge makes 100 of the 49408 tokens .*: are the merges whole?"):
        Tokenizer.from_folder(path.parent)


def test_a_missing_or_broken_file_is_one_sentence_with_its_name(folder):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_folder(path)
    path = folder("sd21-base")
    edit(path / "special_tokens_map.json", pad_token="<nowhere>")
    refused("vocab.json has no '<nowhere>'")
    for file in ("merges.txt", "vocab.json", "tokenizer_config.json"):          # what is read first comes last
        (path / file).write_bytes(b"\xff{")
        refused(f"{file} (can't be read|is not UTF-8)")
        (path / file).unlink()
        refused(f"{file} is missing")


def test_half_a_surrogate_pair_becomes_the_replacement_character(folder):
    ids = Tokenizer.from_folder(folder("sd15"))(["a\ud83d cat", "a\ufffd cat", "\ud83d\udc08", "\N{CAT}"])
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[2], ids[3])


# ------------------------------------------------------------------------------------------------ ids of the reference
def texts(count, seed=0):
    """Texts of all scripts, blanks and marks that this Python's unicodedata knows, composed and decomposed."""
    rng = random.Random(seed)
    words = ("cat Photograph of 1234 masterpiece, 8k (best:1.2) x_y 日本語 Привет العربية "
             "हिन्दी 한국어 ไทย ½ ² Ⅷ ① ٣ 一 Σ ΑΣ ΣΑΣ İ ẞ ß ŉ ΐ Å "
             "ﬁ ᾈ ǅ ſ 's 'T 're 'VE 'm 'Ll 'd ''s ’s 'ſ &amp; &lt; &#39; 👩‍👩‍👧‍👦 "
             "🏳️‍🌈 👍🏽 🇩🇪 🐈‍⬛ ❤️ 1️⃣ ! !! <|startoftext|> <|endoftext|> "
             "<|STARTOFTEXT|> <|EndOfText|>! !<|startoftext|>! <|<|endoftext|>|> <|endoftext|><|ENDOFTEXT|> "
             "<|endoftext|>\u0301 <|endoftext |> <| startoftext| <|stārtoftext|> <|endoftext <pad> <PAD>").split()
    blanks = [chr(code) for code in (*range(9, 14), *range(28, 33), 0x85, 0xa0, 0x1680, 0x180e, 0x2000, 0x2003,
                                     0x200b, 0x200d, 0x2028, 0x202f, 0x3000, 0xfeff)]

    def some(chars, most):
        return "".join(rng.choices(chars, k=rng.randint(1, most)))

    pieces = [lambda: rng.choice(words), lambda: rng.choice(words), lambda: some(KNOWN, 2),
              lambda: some(KNOWN[(start := rng.randrange(rng.choice([len(KNOWN), 0x3000]))):start + 60], 10),
              lambda: some(blanks, 2), lambda: some(MARKS, 3), lambda: rng.choice("aeinsAEßω") + some(MARKS, 4),
              lambda: unicodedata.normalize("NFD", some(COMPOSED, 4)), lambda: some(COMPOSED, 3) + some(MARKS, 2),
              lambda: some([chr(code) for code in range(128)], 12),
              lambda: some([chr(code) for code in range(0x1100, 0x1200)], 5)]
    for _ in range(count):
        gap, length = rng.choice(["", " ", "  "]), rng.choice([1, 2, 3, 5, 8, 15, 40])
        yield gap.join(rng.choice(pieces)() for _ in range(length))


def assert_same_ids(path, prompts):
    transformers = pytest.importorskip(
        "transformers", minversion="5", reason="the reference library transformers 5 is not installed")
    reference = transformers.CLIPTokenizer.from_pretrained(path)
    theirs = reference(prompts, padding="max_length", truncation=True)["input_ids"]
    ours = Tokenizer.from_folder(path)(prompts).tolist()
    for prompt, our, their in zip(prompts, ours, theirs, strict=True):
        assert our == their, ascii(prompt)


@pytest.mark.parametrize("today", [False, True])
@pytest.mark.parametrize("name, count", [
    ("sd21-base", 1000), ("tiny", 500), slow("sd21-base", 50_000), slow("sd15", 5000)])
def test_any_text_gets_the_reference_ids(folder, tmp_path, name, count, today):
    """From a folder as it was published, and as the library saves it today, in one file."""
    path = folder(name)
    if today:
        transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
        transformers.CLIPTokenizer.from_pretrained(path).save_pretrained(path := tmp_path / "new")
        assert not (path / "vocab.json").exists()
    assert_same_ids(path, [*texts(count), *compose_prompts(100)])


@pytest.mark.parametrize("every", [50, slow(1)])
def test_every_character_gets_the_reference_ids(folder, every):
    # Between a sign and a letter it shows whether it is a letter, a number or neither, and its lower case; between a
    # letter and two marks, how it composes. Private characters, ideographs and Korean syllables, five sixths of all,
    # are alike: one in twenty will do.
    alike = [char for char in KNOWN if unicodedata.category(char) == "Co"
             or unicodedata.name(char, "").startswith(("CJK UNIFIED", "TANGUT IDEO", "HANGUL SYLL"))]
    chars = sorted(set(KNOWN) - set(alike)) + alike[::20]
    assert_same_ids(folder("sd15"), [f"!{char}a e{char}\u0323\u0301" for char in chars[::every]])


def test_a_vocabulary_without_all_bytes_gets_the_reference_ids(tmp_path):
    assert_same_ids(write_small(tmp_path, model_max_length=77), ["ABC abcab<pad>b", "az é", *texts(500)])


ADDED = ["<cat-toy>", "<cat>", "<cat-toy>x", "sks Dog", "<Own>", "<ÄÖ>", "*", "éa", "<A  B>", "b", "<pad>"]


def add_tokens(folder, layout, rng):
    """Some of ADDED in a small tokenizer's folder, in one of the layouts in which folders have them: their names."""
    names = rng.sample(ADDED, k=rng.randint(1, 5))
    special = {key: {"content": token, "__type": "AddedToken", "normalized": rng.random() < 0.5}
               for key, token in (("bos_token", "<begin>"), ("eos_token", "<end>"), ("unk_token", "<unk>"))}
    write_small(folder, **rng.choice([{}, special]), model_max_length=77)
    vocab = read_json(folder / "vocab.json")
    new = {name: len(vocab) + k for k, name in enumerate(name for name in names if name not in vocab)}
    flags = {name: {key: rng.random() < 0.5 for key in ("normalized", "special", "lstrip", "rstrip")} for name in names}
    if layout == "added_tokens.json":
        edit(folder / layout, **new)
        some = {"pad_token": "<pad>", "additional_special_tokens": names[:2]}
        edit(folder / "special_tokens_map.json", **rng.choice([{}, some]))
    elif layout == "special tokens":
        edit(folder / "tokenizer_config.json",
             **{rng.choice(["additional_special_tokens", "extra_special_tokens"]): names})
    elif layout == "added_tokens_decoder":
        edit(folder / "tokenizer_config.json", added_tokens_decoder={
            str((vocab | new)[name]): {"content": name, "single_word": False, **flags[name]} for name in names})
    else:
        transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
        reference = transformers.CLIPTokenizer.from_pretrained(folder)
        reference.add_tokens([transformers.AddedToken(name, **flags[name]) for name in names])
        for path in folder.iterdir():
            path.unlink()
        reference.save_pretrained(folder)
        assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    return names


@pytest.mark.parametrize("num", [5, slow(50)])
@pytest.mark.parametrize("layout", ["added_tokens.json", "added_tokens_decoder", "special tokens", "tokenizer.json"])
def test_added_tokens_get_the_reference_ids(tmp_path, layout, num):
    for seed in range(num):
        rng = random.Random(seed)
        (path := tmp_path / str(seed)).mkdir()
        names = add_tokens(path, layout, rng)
        pieces = [*names, *names, *map(str.upper, names), "ab", " ", "a b ", "  ", "\t", "\u2003", *texts(5, seed)]
        assert_same_ids(path, ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(30)])
