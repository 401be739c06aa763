"""The processes of a run: the device, torchrun, sharding (FSDP2), signals, memory.

    rank, world, local_rank = torchrun()
    device = pick_device(args.device, local_rank)
    join(rank, world, "nccl")
    with together(rank): dist.all_reduce(tensor)            # a lost peer is a BadInput
"""

import contextlib
import datetime
import os
import signal
import threading
import time
import uuid
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from plumbing.files import BadInput, out_of_memory, parsing

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEETING = datetime.timedelta(minutes=30)        # how long processes wait for others that are still loading,
WAIT = datetime.timedelta(minutes=2)            # and in a step; a process that is later is taken for dead


def pick_device(name=None, local_rank=0):
    """The device of --device; None is CUDA if there is one, else the CPU. Of several GPUs, that of the local rank.
    Its float32 is float32, not TF32, because 1 / alpha_T multiplies rounding errors. Raises BadInput."""
    torch.backends.cudnn.allow_tf32 = False
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name or device} is not available here ({reason}): try cpu") from None
    return device


def torchrun():
    """(rank, number of processes, rank on this machine). If a part of torchrun's environment is missing, the rest is
    taken for what a cluster left there, and this is the only process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = ", ".join(name for name in names if not os.environ.get(name))
    size = os.environ.get("WORLD_SIZE") or "1"
    if missing and size != "1":
        warnings.warn(f"WORLD_SIZE={size} is not torchrun's, without {missing}: one process works alone", stacklevel=2)
    if missing or size == "1":
        return 0, 1, 0
    with parsing("RANK, WORLD_SIZE and LOCAL_RANK"):
        rank, world, local_rank = (int(os.environ[name]) for name in names[:3])
        if not 0 <= rank < world:
            raise ValueError(f"there is no process {rank} of {world}")
        return rank, world, local_rank


def join(rank, world, backend):
    """Meet the other processes, which may still be downloading. From now on until the first step, Ctrl-C ends this
    process at once. Raises BadInput."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)            # Python's own handler waits, too
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world, timeout=MEETING))
        store.set_timeout(MEETING)
        store = dist.PrefixStore(agree(store, rank, world), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAIT)
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"the processes did not meet at {where}: {error}") from None


def agree(store, rank, world):
    """A name for this start of the processes: the same for all of them, and no other start has it. It is needed
    because torchrun keeps its store when it restarts processes, with the addresses at which the dead ones listened."""
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
    """Report a lost or late peer as BadInput."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise BadInput(f"process {rank} has lost the others: {error}") from None


# ---------------------------------------------------------------------------------------------------------- sharding
def shard(network, device, dtype):
    """Split a network's parameters over the processes, a block at a time (FSDP2). Each process holds its part, and has
    a whole block only while it computes with it. `dtype`: of a gathered block; the last layers stay float32."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False)
    last = network.conv_norm_out, network.conv_out
    for part in (*network.blocks(), *last, network):        # the network itself has what is in no other part
        own_policy = MixedPrecisionPolicy() if part in last else policy
        fully_shard(part, mesh=mesh, mp_policy=own_policy, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)                # the sum over the processes, not the mean,
        part.set_force_sum_reduction_for_comms(True)        # in a way that gloo supports, too


def local(tensor):
    """This process's part of a tensor; all of it, where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    """All of a tensor. Where it is sharded, all processes have to ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------- signals, memory, load
class Stop:
    """Handler of SIGTERM, SIGHUP and Ctrl-C: the loop ends its step, saves and stops. A second Ctrl-C stops at once.
    .asked: whether a signal came; .interrupted: whether one of them was Ctrl-C."""
    asked = interrupted = False

    def __init__(self, speaks):
        self.speaks = speaks
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        signal.set_wakeup_fd(mouth)                         # every signal is heard there at once, even in a C function,
        threading.Thread(target=self.listen, args=[ear], daemon=True).start()       # where this handler has to wait
        for number in {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:           # as nohup sets it
                signal.signal(number, self)

    def listen(self, ear):
        """End this process at a Ctrl-C that is not the first signal, even while it waits for the others."""
        os.read(ear, 1)
        while os.read(ear, 1)[0] != signal.SIGINT:
            pass
        time.sleep(1)                                       # for the handler, if nothing keeps it
        os._exit(130)

    def __call__(self, number, _):
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        if number == getattr(signal, "SIGHUP", None):       # the terminal is closed: nothing can be printed any more
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if self.speaks and not self.asked:
            with contextlib.suppress(OSError):              # not print, which may be at work already
                os.write(2, b"\nstopping after this step; Ctrl-C now stops at once, without saving\n")
        self.asked, self.interrupted = True, self.interrupted or number == signal.SIGINT


def peak_memory(device):
    """The most bytes that this process has held: of the GPU's memory, or of a Linux machine's; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else system_memory("self/status", "VmHWM")


def system_memory(name, field):
    """Bytes that Linux reports in a field of /proc/NAME; 0 elsewhere."""
    with contextlib.suppress(OSError, ValueError, StopIteration), open(f"/proc/{name}") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
    return 0


def warn_if_busy(device):
    """Say it once, if other work keeps this machine's cores busy: threads of torch then spin for each other."""
    if device.type != "cpu" or not hasattr(os, "getloadavg") or torch.get_num_threads() == 1:
        return
    load, cores = os.getloadavg()[0], os.cpu_count()
    if load > 0.5 * cores and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        warnings.warn(f"other work keeps about {load:.0f} of {cores} cores busy, and torch's threads then wait for "
                      "each other: OMP_NUM_THREADS=1 in front of the command made a step 6 times as fast where two of "
                      "two cores were busy (0.46 s for 3.0 s)", stacklevel=2)
