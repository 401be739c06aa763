"""Errors that a person can mend, JSON, and files that are either whole or absent.

    command(main)                                           # BadInput: one line, exit code 2
    with parsing(path): ...                                 # what is wrong inside is a BadInput that names the path
    write_json("runs/mine/config.json", {"lr": 1e-5})       # a crash at any moment leaves the old file whole
"""

import contextlib
import errno
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError


class BadInput(ValueError):
    """What the person at the keyboard can put right: one sentence, and exit code 2 from every command."""


class Stream:
    """stdout or stderr that never stops the work. A character that its encoding lacks (an emoji in cp1252) is escaped.
    Once nobody reads it any more (`| head -1`, a closed terminal), the rest goes to /dev/null."""

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
    """Run the main() of a command. A BadInput is one line and exit code 2, and a warning is one line."""
    with contextlib.redirect_stdout(Stream(sys.stdout)), contextlib.redirect_stderr(Stream(sys.stderr)):
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            main()
        except (BadInput, OSError) as error:
            sys.exit(fail(str(error)))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = str(error).split(". ")[0]
            sys.exit(fail(f"out of memory, give half the --micro-batch, or --batch ({reason})"))
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            sys.stdout.flush()


def fail(message):
    """Say on one line what is wrong, and return the exit code."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


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
