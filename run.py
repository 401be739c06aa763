"""A run of train.py: its processes, its folder and the checkpoints in it, its signals.

    with hold(out):                                         # nobody else trains there
        step, folder, saved = newest(out)                   # the last whole checkpoint
        join(rank, world, "nccl")
        load(folder, state)
        saver = Saver(out, options, rank, world, step, executor)
        saver.save(state, student, step)                    # state/step_N, and then student/

A checkpoint is a folder of safetensors, of which every process writes its part (torch.distributed.checkpoint), and
checkpoint.json: the options that made it, the sha256 of each file. Any number of processes reads it. It has
another name until it is on disk, all of it; so a crash at any moment leaves the one before.
"""

import contextlib
import datetime
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub.utils import WeakFileLock
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from checkpoint import WEIGHTS, BadInput, open_tensors, parsing, read_json, write_file, write_json
from student import save_student

MEETING = datetime.timedelta(minutes=30)        # how long processes wait for others that are loading,
WAIT = datetime.timedelta(minutes=2)            # and then in a step: who is later is taken for dead
INFO = "checkpoint.json"
FILE_SIZE = 2**29                               # bytes of a file of a checkpoint, of which there is a copy in memory

def join(rank, world, backend):
    """Meet the other processes, which may still be downloading. Says so if that takes long, because one may never come.
    Raises BadInput."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    patience = threading.Timer(20, print, [f"process {rank} of {world} waits for the others at {where}"])
    patience.daemon = True
    patience.start()
    try:
        [(store, *_)] = itertools.islice(dist.rendezvous("env://", rank, world, timeout=MEETING), 1)
        store.set_timeout(MEETING)
        store = dist.PrefixStore(agree(store, rank, world), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAIT)
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"the processes did not meet at {where}: {error}") from None
    finally:
        patience.cancel()

def agree(store, rank, world):
    """A name for this start of the processes, the same for all of them, and no other start's: torchrun keeps its store
    when it restarts them, and in it are still the addresses at which the dead ones listened."""
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("start", own)
        for other in range(1, world):
            answer = store.get(f"{own}/{other}").decode()               # waits until it is there
            store.set(f"{own}/{answer}", "welcome")
        return own
    start, deadline = None, time.monotonic() + MEETING.total_seconds()
    while start is None or not store.check([f"{start}/{own}"]):
        if time.monotonic() > deadline:
            raise RuntimeError("the first one did not come")
        start = store.get("start").decode()                             # perhaps that of a first process that is dead
        store.set(f"{start}/{rank}", own)
        time.sleep(0.1)
    return start

@contextlib.contextmanager
def together(rank):
    """What ends because another process is gone, or does not come in time, is a BadInput."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "can't allocate memory" in str(error):           # of a CPU
            raise
        raise BadInput(f"process {rank} has lost the others: {error}") from None

def shard(network, device, dtype):
    """Split a network's parameters over the processes, a block at a time: FSDP2. Each holds its part, and has a whole
    block only while it computes with it. dtype: in which blocks come together; their float32 last layers stay so."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False)
    for block in network.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for last in (network.conv_norm_out, network.conv_out):
        fully_shard(last, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)          # the sum over the processes, not the mean,
            module.set_force_sum_reduction_for_comms(True)  # in a way that gloo has, too

def reduce_in_backward(network, now):
    """Whether the next backward pass is the last of a step, so that the gradients' parts go to their processes. Until
    then each has a gradient of the whole network, in float32, which is reduced once."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)

def local(tensor):
    """This process's part of a tensor; all of it, where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

def full(tensor):
    """All of a tensor. Where it is sharded, all processes have to ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

@contextlib.contextmanager
def hold(out):
    """Keep other runs out of the folder, and remove what a killed one left half written. Raises BadInput, saying who is
    in it. A folder that is still empty at the end is removed again."""
    state, lock, holder = out / "state", out / "state" / ".lock", out / "state" / ".holder"
    with contextlib.ExitStack() as stack:                   # it undoes in reverse order
        stack.callback(remove_empty, state, out)
        try:
            state.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(lock, timeout=0.1))        # where flock works, the kernel frees the dead's
        except TimeoutError:
            who = holder.read_text() if holder.exists() else "another process"
            raise BadInput(f"{who} is training in {out}: wait for it, or choose another --out (if it is gone, remove "
                           f"{lock})") from None
        except OSError as error:
            raise BadInput(f"can't write {out}: {error.strerror or error}") from None
        stack.callback(remove, holder, lock)
        write_file(holder, lambda path: path.write_text(
            f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')},"))
        folders = (state, out / "student", out / "samples")
        left = [path for folder in folders for pattern in ("*.new", ".tmp*") for path in folder.glob(pattern)]
        remove(*left, out / "config.json.new", out / "log.jsonl.new")
        for path in state.glob("step_*.new"):
            shutil.rmtree(path, ignore_errors=True)
        yield

def remove(*paths):
    for path in paths:
        with contextlib.suppress(OSError):                  # a folder, or what Windows holds open
            path.unlink()

def remove_empty(*folders):
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()

def checkpoints(out):
    """{step: folder} of a run's checkpoints, the latest first."""
    found = {int(path.name[5:]): path for path in (out / "state").glob("step_*") if path.name[5:].isdecimal()}
    return dict(sorted(found.items(), reverse=True))

def newest(out):
    """(step, folder, options) of the last checkpoint that is whole, (0, None, None) if there never was one. Warns of a
    damaged one. Raises BadInput if all are."""
    damaged = []
    for step, folder in checkpoints(out).items():
        try:
            options = read_options(folder)
        except BadInput as error:
            damaged.append(str(error))
            continue
        for error in damaged:
            warnings.warn(f"{error}: going on from {folder.name}", stacklevel=2)
        return step, folder, options
    if damaged:
        raise BadInput(f"{damaged[0]}; move {out} away to start anew")
    return 0, None, None

def read_options(folder):
    """The options of a checkpoint, if all its files are as they were written. Raises BadInput."""
    info = read_json(folder / INFO)
    with parsing(folder / INFO):
        info = {"options": dict(info["options"]), "files": dict(info["files"])}
        if set(info["files"]) != {path.name for path in folder.glob("*.safetensors")}:
            raise BadInput(f"{folder} has not the files that it is made of: {', '.join(info['files'])}")
    for name, written in info["files"].items():
        try:
            found = sha256(folder / name)
        except OSError as error:
            raise BadInput(f"{folder / name}: {error.strerror or error}") from None
        if found != written:
            raise BadInput(f"{folder / name} is damaged: it has another sha256 than when it was written")
    return info["options"]

def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def check_options(out, options, saved):
    """Raise BadInput if the folder holds what a run of these options must not replace: the state of another run, or a
    student whose state is gone. Before the first save, and for what may change between stretches, all are free.
    saved: of the last checkpoint, if there is one."""
    for path in (out / "student" / name for name in (WEIGHTS, "config.json", "student.json")):
        if path.is_dir():
            raise BadInput(f"{path} is a folder, in the way of a file")
    if saved is None:
        if (out / "student").exists():
            raise BadInput(f"{out} holds a student, but no state to go on from: move it away or choose another --out")
        return
    free = {"steps", "micro_batch", "grad_checkpointing", "device", "shard", "save_every", "sample_every"}
    if saved.get("fingerprint") == options["fingerprint"]:
        free.add("teacher")                                 # the same one, perhaps in another place
    differ = [f"{key} {saved.get(key)} there, {value} here" for key, value in options.items()
              if key not in free and saved.get(key) != value]
    if differ:
        raise BadInput(f"{out} holds another run ({'; '.join(differ)}): repeat its options or choose another --out")

def load(folder, state):
    """Fill a process's state with what it needs of a checkpoint, whichever processes wrote that. Raises BadInput."""
    reader = dcp.HuggingFaceStorageReader(folder)
    with parsing(folder):
        saved = reader.read_metadata().state_dict_metadata
        wrong = [name for name in saved.keys() | state.keys()
                 if name not in saved or name not in state or saved[name].size != state[name].shape]
        if wrong:
            raise BadInput(f"{folder} is not this run's checkpoint ({', '.join(sorted(wrong)[:4])}): move the "
                           "run's folder away to start anew")
        dcp.load(state, storage_reader=reader, no_dist=True)

class Saver:
    """Writes checkpoints, one at a time; beside the computation, where the machine has memory for copies of it all. All
    processes call it at the same steps. Errors of writing are raised by the next call: BadInput. executor: a thread."""

    def __init__(self, out, options, rank, world, step, executor):
        self.out, self.options, self.rank, self.world, self.step = out, options, rank, world, step
        # For the thread alone; who has written his part waits for the slowest
        self.group = dist.new_group(backend="gloo", timeout=MEETING) if world > 1 else None
        self.executor, self.pending = executor, None

    def save(self, state, student, step):
        """Save the state, and then the student, so that there is none without its state."""
        self.wait()
        if broken := not_finite(state):
            raise BadInput(f"{broken} is not finite after step {step}; what {self.out} holds is whole: lower --lr, "
                           "--match-lr or --critic-lr, in another --out")
        # A sharded tensor is everybody's; the others, which all processes have, are dealt out in equal parts
        *ends, total = itertools.accumulate((tensor.nbytes for tensor in state.values()), initial=0)
        part = {name: tensor for (name, tensor), end in zip(state.items(), ends)
                if end * self.world // total == self.rank or isinstance(tensor, DTensor)}
        files = {name: 1 + end // FILE_SIZE for name, end in zip(state, ends)}
        folder = self.out / "state" / f"step_{step}.new"
        storage = dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
        beside = torch.tensor(spare_memory() > 2 * total, dtype=torch.int32)
        if self.world > 1:
            dist.all_reduce(beside, dist.ReduceOp.MIN, self.group)          # all do it, or none
        write = dcp.async_save if beside else dcp.save
        tensors = whole_tensors(student, self.rank, copy=bool(beside))
        with writing(folder):
            done = write(part, storage_writer=storage, process_group=self.group, no_dist=self.world == 1)
        self.pending = self.executor.submit(self.complete, done if beside else None, folder, student, tensors, step)
        if not beside:
            self.wait()

    def complete(self, done, folder, student, tensors, step):
        """Wait until all parts are on disk, and let the checkpoint count. Nobody is through before the first one is."""
        with writing(folder):
            if done:
                done.result()
        if self.rank == 0:
            self.publish(folder, student, tensors, step)
        if self.world > 1:
            dist.barrier(self.group)

    def publish(self, folder, student, tensors, step):
        """Give a checkpoint that is on disk its sums and its name, save the student, and remove what is too old."""
        with writing(folder):
            files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
            write_json(folder / INFO, {"options": self.options, "files": files})
            final = folder.with_suffix("")
            shutil.rmtree(final, ignore_errors=True)        # a damaged one
            folder.rename(final)
        for old, path in checkpoints(self.out).items():
            if old not in (step, self.step):                # the last two are kept
                shutil.rmtree(path, ignore_errors=True)
        save_student(self.out / "student", student, tensors, step=str(step))
        self.step = step

    def wait(self):
        """Until the last checkpoint is written. Raises BadInput if it could not be."""
        if self.pending:
            with together(self.rank):
                self.pending.result()

    def failed(self):
        """Whether the last checkpoint could not be written."""
        return bool(self.pending and self.pending.done() and self.pending.exception())

@contextlib.contextmanager
def writing(folder):
    """An error of writing is a BadInput, and a full disk gets its space back."""
    try:
        yield
    except (OSError, dcp.api.CheckpointException) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, dcp.api.CheckpointException):
            error = next(iter(error.failures.values()))[0]
            if isinstance(error, KeyboardInterrupt):
                raise error from None
        raise BadInput(f"can't write {folder}: {getattr(error, 'strerror', None) or error}") from None

def whole_tensors(student, rank, copy):
    """The first process's tensors of a student's network, whole; empty on the others, which have to take part."""
    tensors = {}
    for name, tensor in student.network.state_dict().items():
        tensor = full(tensor.detach())
        if rank == 0:
            tensors[name] = tensor.to("cpu", copy=copy)
    return tensors

def peak_memory(device):
    """Bytes that this process has held at most: of the GPU's memory, or of the machine's; 0 where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":                             # whose getrusage says the parent's, if that was more
        return system_memory("self/status", "VmHWM")
    with contextlib.suppress(ImportError):                  # Windows has no such module
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0

def spare_memory():
    """Bytes of the machine's memory that nobody uses; 0 where the system doesn't say."""
    return system_memory("meminfo", "MemAvailable")

def system_memory(name, field):
    """Bytes that Linux says of a field of /proc/NAME; 0 elsewhere."""
    with contextlib.suppress(OSError, ValueError, StopIteration), open(f"/proc/{name}") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
    return 0

def saved_step(path):
    """The step, a text, in the metadata of a student's weights; None if there is no such file, or none that is whole.
    """
    with contextlib.suppress(BadInput), open_tensors(path) as file:
        return (file.metadata() or {}).get("step")

def not_finite(state):
    """The name of a tensor with a value that is not finite, which would spoil the student from then on; or None."""
    return next((name for name, tensor in state.items() if not local(tensor).isfinite().all()), None)

def check_space(out, state, student):
    """Raise BadInput if the disk cannot hold three checkpoints, of which two are kept, and a student that is replaced.
    state, student: bytes of its files."""
    files = [path for folder in (out / "state", out / "student") for path in folder.rglob("*.safetensors")]
    need = 3 * state + 2 * student - sum(path.stat().st_size for path in files)
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if need > free:
        raise BadInput(f"no room in {out}, where {free / 1e9:.2f} GB are free: a checkpoint takes {state / 1e9:.2f} GB "
                       "on disk, three of them while one is written")

def rewind_log(path, step):
    """Drop the lines that a killed run logged after its last checkpoint, and a torn one. What is no record of a step is
    somebody's remark, and stays. Returns the run's seconds up to that checkpoint."""
    text = path.read_bytes() if path.exists() else b""
    kept, seconds = [], 0
    for line in text.split(b"\n")[:-1]:
        record = {}
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            kept.append(line)
        elif record["step"] <= step:
            kept.append(line)
            seconds = record["seconds"] if isinstance(record.get("seconds"), (int, float)) else seconds
    kept = b"".join(line + b"\n" for line in kept)
    if kept != text:
        write_file(path, lambda p: p.write_bytes(kept))
    return seconds

def warn_once(message, *_):
    """Print a warning and silence those that begin alike: a prompt file may have thousands of prompts that are cut."""
    print(f"warning: {message} (others like it are not shown)", file=sys.stderr)
    warnings.filterwarnings("ignore", re.escape(str(message)[:20]))

class Stop:
    """Handler of SIGTERM, SIGHUP and Ctrl-C: the loop ends its step, saves and stops; a second Ctrl-C stops it now."""
    asked = interrupted = False

    def __init__(self, speaks):
        self.speaks = speaks
        for number in {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:           # as nohup sets it
                signal.signal(number, self)

    def __call__(self, number, _):
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        if self.speaks and not self.asked:
            with contextlib.suppress(OSError):              # not print, which may be at work already
                os.write(2, b"\nstopping after this step; Ctrl-C now stops at once, without saving\n")
        self.asked, self.interrupted = True, self.interrupted or number == signal.SIGINT
