"""Errors that a person can mend, paths, JSON, and files that are either whole or absent.

    command(main)                                           # BadInput: one line, exit code 2
    option("--out", type=user_path)                         # ~ is a home folder; so in user_spec, for names and folders
    check_new(args.out)                                     # nothing of anybody's is replaced
    with parsing(path): ...                                 # what is wrong inside is a BadInput that names the path
    write_json("runs/mine/config.json", {"lr": 1e-5})       # a crash at any moment leaves the old file whole

Every message for the person at the keyboard is one sentence.
"""

import contextlib
import errno
import json
import math
import os
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from safetensors import SafetensorError


NOT_OURS = "was not made by this project, and is not replaced: move it away, or choose another name"


class BadInput(ArgumentTypeError, ValueError):
    """What the person at the keyboard can put right: one sentence, and exit code 2 from every command."""


def command(main):
    """Run the main() of a command. A BadInput is one line and exit code 2, and a warning is one line."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                  # an emoji must not end a run in a cp1252 terminal
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (BadInput, OSError, RuntimeError) as error:
        message = str(error)
        if isinstance(error, RuntimeError):
            if not out_of_memory(error):
                raise
            message = f"out of memory, give half the --micro-batch, or --batch ({message.split('. ')[0]})"
        print("error:", " ".join(message.split()), file=sys.stderr)
        sys.exit(2)


def new_parser(doc, **rest):
    """An ArgumentParser whose --help begins with a command's docstring."""
    return ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False, **rest)


def out_of_memory(error):
    """Whether a RuntimeError means that memory ran out. CUDA has a class for that, the CPU has a sentence."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def parsing(where):
    """Whatever goes wrong while somebody's file is taken apart becomes a BadInput that begins with `where`, its name.
    """
    try:
        yield
    except BadInput:
        raise
    except KeyError as error:
        raise BadInput(f"{where} has no {error}") from None
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError) as error:
        raise BadInput(f"{where}: {error}") from None


def user_path(text):
    """The path that a person writes, where ~ is a home folder. Raises BadInput."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise BadInput(f"{text}: there is no such user, or no home folder") from None


def user_spec(text):
    """The name, hub id or folder that a person writes, where ~ is a home folder. Raises BadInput."""
    return str(user_path(text)) if text.startswith("~") else text if Path(text).is_dir() else text.rstrip("/")


def number_or_range(text):
    """The number that a person writes, or the list of two that LO:HI stands for. Raises BadInput, and ValueError."""
    numbers = [float(part) for part in text.split(":")]     # argparse reports a ValueError
    if len(numbers) not in (1, 2) or not all(map(math.isfinite, numbers)) or numbers != sorted(set(numbers)):
        raise BadInput(f"{text} is neither a number nor LO:HI")
    return numbers if len(numbers) == 2 else numbers[0]


def check_new(path):
    """Raise BadInput unless there is nothing at this path, or an empty folder."""
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"{path} is there, and not empty: give a new name")


def read_text(path):
    """The text of a UTF-8 file. Raises BadInput."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})") from None


def read_json(path, kind=dict, default=None):
    """The value in a JSON file, which must be of this kind; the default, if there is one, for a missing file. Raises
    BadInput."""
    if default is not None and not Path(path).exists():
        return default
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(value, kind):
        raise BadInput(f"{path} holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def write_file(path, write):
    """Call write(temporary path), flush to disk, rename: a crash at any moment leaves the old file whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.boot-new")    # which is nobody else's
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
    """fsync, where the file system supports it."""
    with open(path, "r+b") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise


def write_json(path, value):
    """Write a value as JSON, atomically. Raises BadInput."""
    write_file(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))
