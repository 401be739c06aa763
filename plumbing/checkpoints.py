"""A run's folder: who trains there, its checkpoints, its log.

    with lock(out):                                         # nobody else trains there
        step, folder, options = newest(out)                 # the last whole checkpoint
        load(folder, state)
        save(out, step, state, network, ...)                # state/step_N, and then student/

A checkpoint is a folder of safetensors, of which every process writes its part (torch.distributed.checkpoint), and
checkpoint.json: the options that made it, and the sha256 of each file. Any number of processes can read it. It gets its
name only when all of it is on disk, so a crash at any moment leaves the one before.
"""

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import socket
import time
import warnings

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub.utils import WeakFileLock
from torch.distributed.tensor import DTensor

from plumbing.files import NOT_OURS, BadInput, parsing, read_json, write_file, write_json
from plumbing.processes import full, local

INFO = "checkpoint.json"
FILE_SIZE = 2**29           # Bytes of a file of a checkpoint, of which there is a copy in memory.
# Options that may change when a run is resumed, because they do not change the student beyond rounding
FREE = {"steps", "micro_batch", "grad_checkpointing", "device", "shard", "every", "samples"}


# -------------------------------------------------------------------------------------------------------- the folder
@contextlib.contextmanager
def lock(out):
    """Keep other runs out of the folder, and remove checkpoints that a killed run left half written. Raises BadInput,
    naming the process that uses the folder."""
    state, locked, holder = out / "state", out / "state" / ".lock", out / "state" / ".holder"
    with contextlib.ExitStack() as stack:
        try:
            state.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(locked, timeout=0.1))      # where flock works, the kernel frees the dead's
        except TimeoutError:
            who = holder.read_text() if holder.exists() else "another process"
            raise BadInput(f"{who} is training in {out}: wait for it, or choose another --out (if it is gone, remove "
                           f"{locked})") from None
        except OSError as error:
            raise BadInput(f"can't write {out}: {error.strerror or error}") from None
        stack.callback(holder.unlink, missing_ok=True)
        write_file(holder, lambda path: path.write_text(
            f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')},"))
        for path in state.glob("step_*[0-9].new"):
            shutil.rmtree(path, ignore_errors=True)
        yield


def check_folder(out):
    """Raise BadInput if the folder has files under the names of a run's that no run has written: there is neither a
    checkpoint nor a config.json of train.py's."""
    for path in (out / "config.json", out / "student" / "student.json", *out.glob(f"state/step_*/{INFO}")):
        with contextlib.suppress(BadInput):
            keys = read_json(path, default={}).keys()
            if {"fingerprint", "teacher"} <= keys or {"options", "files"} <= keys:
                return
    paths = [out / name for name in ("config.json", "log.jsonl", "samples", "student")] + [*out.glob("state/[!.]*")]
    for path in filter(os.path.lexists, paths):             # also a link that leads nowhere
        raise BadInput(f"{path} {NOT_OURS}")


def check_options(out, options, saved):
    """Raise BadInput if the folder holds what a run of these options must not replace: the state of another run, or a
    student without its state. `saved`: the options of the last checkpoint, or None; before the first checkpoint every
    option may change."""
    if saved is None:
        if (out / "student").exists():
            raise BadInput(f"{out} holds a student, but no state to go on from: move it away or choose another --out")
        return
    free = FREE | {"teacher"} if saved.get("fingerprint") == options["fingerprint"] else FREE   # it may have moved
    differ = [f"{key} {saved.get(key)} there, {value} here" for key, value in options.items()
              if key not in free and saved.get(key) != value]
    if differ:
        raise BadInput(f"{out} holds another run ({'; '.join(differ)}): repeat its options or choose another --out")


def check_space(out, size):
    """Raise BadInput if the disk cannot hold three checkpoints of `size` bytes: two are kept while a third is written.
    """
    need = 3 * size - sum(path.stat().st_size for path in (out / "state").rglob("*.safetensors"))
    folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise BadInput(f"no room in {out}, where {free / 1e9:.2f} GB are free: a checkpoint takes {size / 1e9:.2f} GB "
                       "on disk, and there are three of them while one is written")


def rewind_log(path, step):
    """Drop the records of steps that a killed run logged after its last checkpoint, and a torn line. Other lines are
    somebody's remarks, and stay. Returns the run's seconds up to that checkpoint."""
    text, seconds = path.read_bytes() if path.exists() else b"", 0
    kept = []
    for line in text.split(b"\n")[:-1]:
        record = re.match(rb'{"step": (\d+),.*"seconds": ([\d.]+),', line)
        if not record or int(record[1]) <= step:
            kept.append(line + b"\n")
            seconds = float(record[2]) if record else seconds
    if text != b"".join(kept):
        write_file(path, lambda p: p.write_bytes(b"".join(kept)))
    return seconds


# ---------------------------------------------------------------------------------------------------------- reading
def checkpoints(out):
    """{step: folder} of a run's checkpoints, the latest first."""
    found = {int(path.name[5:]): path for path in (out / "state").glob("step_*") if path.name[5:].isdecimal()}
    return dict(sorted(found.items(), reverse=True))


def newest(out):
    """(step, folder, options) of the last checkpoint that is whole, or (0, None, None) if there never was one. Warns of
    a damaged checkpoint. Raises BadInput if all are damaged."""
    found = checkpoints(out)
    for step, folder in found.items():
        try:
            return step, folder, read_options(folder)
        except BadInput as error:
            warnings.warn(f"{error}; the checkpoint before it is tried", stacklevel=2)
    if found:
        raise BadInput(f"all checkpoints in {out / 'state'} are damaged; move {out} away to start anew")
    return 0, None, None


def read_options(folder):
    """The options of a checkpoint, if all its files are as they were written. Raises BadInput."""
    info = read_json(folder / INFO)
    with parsing(folder / INFO):
        options, files = dict(info["options"]), dict(info["files"])
    for name, written in files.items():
        if not (folder / name).is_file() or sha256(folder / name) != written:
            raise BadInput(f"{folder / name} is missing or damaged: it has another sha256 than when it was written")
    return options


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder, state):
    """Fill a process's state with its share of a checkpoint, whichever processes wrote that. What Run.needed_state left
    out stays as it is. Raises BadInput."""
    reader = dcp.HuggingFaceStorageReader(folder)
    with parsing(folder):
        saved = reader.read_metadata().state_dict_metadata
        state = {name: tensor for name, tensor in state.items()
                 if name in saved or not (".exp_avg." in name or name.startswith("critic."))}
        wrong = [name for name in saved.keys() | state.keys()
                 if name not in saved or name not in state or saved[name].size != state[name].shape]
        if wrong:
            raise BadInput(f"{folder} is not this run's checkpoint ({', '.join(sorted(wrong)[:4])}): move the "
                           "run's folder away to start anew")
        dcp.load(state, storage_reader=reader, no_dist=True)


# ---------------------------------------------------------------------------------------------------------- writing
def save(out, step, state, network, options, write_student, rank=0, world=1, group=None):
    """Write the checkpoint of a step, and after it the student, so that there is no student without its state. The last
    two checkpoints are kept. All processes of the group call it together, each writes its part, and none goes on before
    all of it is on disk. Raises BadInput, and then the checkpoint before is whole.
    `network`: the student's. `write_student`: callable (tensors)."""
    broken = next((name for name, tensor in state.items() if not local(tensor).isfinite().all()), None)
    if broken:
        raise BadInput(f"{broken} is not finite after step {step}; what {out} holds is whole: lower --lr or "
                       "--critic-lr, in another --out")
    # Of sharded tensors every process writes its part; the other tensors are dealt out in equal shares.
    *ends, total = itertools.accumulate((tensor.nbytes for tensor in state.values()), initial=0)
    part = {name: tensor for (name, tensor), end in zip(state.items(), ends)
            if end * world // total == rank or isinstance(tensor, DTensor)}
    files = {name: 1 + end // FILE_SIZE for name, end in zip(state, ends)}
    folder, final = out / "state" / f"step_{step}.new", out / "state" / f"step_{step}"
    storage = dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    tensors = whole_tensors(network, rank)
    with writing(folder):
        dcp.save(part, storage_writer=storage, process_group=group, no_dist=world == 1)
        if rank == 0:
            sums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
            write_json(folder / INFO, {"options": options, "files": sums})
            shutil.rmtree(final, ignore_errors=True)        # a damaged one
            folder.rename(final)
    if rank == 0:
        write_student(tensors)
        for old in [folder for folder in checkpoints(out).values() if (folder / INFO).exists()][2:]:
            shutil.rmtree(old, ignore_errors=True)
    if world > 1:
        dist.barrier(group)


@contextlib.contextmanager
def writing(folder):
    """Turn an error of writing into BadInput, and give a full disk its space back."""
    try:
        yield
    except (OSError, dcp.api.CheckpointException) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, dcp.api.CheckpointException):
            error = next(iter(error.failures.values()))[0]
            if isinstance(error, KeyboardInterrupt):
                raise error from None
        raise BadInput(f"can't write {folder}: {getattr(error, 'strerror', None) or error}") from None


def whole_tensors(network, rank):
    """{name: tensor} of a network, whole, on the CPU, for rank 0. The other processes have to take part, and get {}."""
    whole = ((name, full(p.detach())) for name, p in network.own_parameters().items())      # one at a time
    return {name: tensor.cpu() for name, tensor in whole if rank == 0}
