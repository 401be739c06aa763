r"""Distil a diffusion teacher into a one-step student with BOOT: no images, only noise and prompts.

    python train.py                                             the embedded teacher on a laptop, minutes
    python train.py --teacher sd21 --out runs/mine              one GPU, or the CPU where there is none
    torchrun --nproc_per_node=8 train.py --teacher sd21         eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
        train.py --teacher sd21

The same command again resumes. Ctrl-C saves and stops.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import save_file
from tqdm import tqdm

from checkpoint import (EMBEDDED, HUB, WEIGHTS, BadInput, command, is_embedded, last_name, open_tensors, parsing,
                        read_tensors, write_file, write_json)
from matching import critic_loss, limited_guidance, matching_loss
from signal_ode import bootstrap_loss, boundary_loss, contraction
from student import Student, new_critic, new_student, save_student
from teacher import PRECISION, image_grid, load_teacher, noise, pick_device, readable, to_pil, training_prompts

INPUT_NOISE = 2.27          # an epsilon student's input time i is where sigma_i / alpha_i is this: found by trial
BINS = 4                    # the log has the bootstrap loss of each quarter of the times 1..T
STATE = "state/state.safetensors"                           # below --out, what resume needs
BOUNDARY_EVERY = 4          # every 4th sample has a boundary loss too: it is learned fast, and costs 5 passes
PATH_EVERY = 5              # of the student's steps, once it is matched, every 5th still has BOOT's losses
BETA_1 = 0.9                # Adam's, of BOOT
MATCH_BETA_1 = 0.0          # of matching: with momentum the critic lags behind the student
MATCH_TIMES = 0.02, 0.98    # tau is drawn between these, times T
MEETING = datetime.timedelta(minutes=30)                    # how long processes wait for others that are loading,
WAIT = datetime.timedelta(minutes=2)                        # and then in a step: who is later is taken for dead
# What suits an embedded teacher, a miniature, and what suits a published one, where no option says otherwise
DEFAULTS = {
    "steps": (1300, 50_000), "batch": (32, 64), "micro_batch": (None, 4), "lr": (5e-4, 1e-5), "warmup": (50, 500),
    "ema": (0.99, 0.9999), "guidance": (3.0, 7.5), "match_lr": (1e-4, 2e-6), "critic_lr": (5e-5, 1e-6),
    "save_every": (100, 500), "sample_every": (100, 1000)}
RANGES = {
    "steps": (1, math.inf), "batch": (1, math.inf), "micro_batch": (1, math.inf), "lr": (0, math.inf),
    "warmup": (0, math.inf), "decay": (0, 1), "ema": (0, 0.999999), "boundary_weight": (0, math.inf),
    "weight": (-10, 10), "match": (0, math.inf), "match_from": (0, 0.99), "match_guidance": (0, math.inf),
    "match_until": (0, 1), "match_lr": (0, math.inf), "critic_lr": (0, math.inf), "critic_updates": (1, math.inf),
    "save_every": (1, math.inf), "sample_every": (0, math.inf)}

def default(name, teacher):
    """What DEFAULTS says for a teacher of this name or folder."""
    return DEFAULTS[name][0 if is_embedded(teacher) else 1]

def add_options(parser):
    either = {name: f"(default: {embedded} for an embedded teacher, {published} for another)"
              for name, (embedded, published) in DEFAULTS.items()}
    option = parser.add_argument_group("what").add_argument
    option("--teacher", default="tiny", help=f"{', '.join([*EMBEDDED, *HUB])}, a hub id, each with @REVISION if "
           "wished, or a folder in the diffusers layout (default: tiny)")
    option("--out", type=Path, help="where everything goes; the same command resumes from it (default runs/TEACHER)")
    option("--prompts", type=Path, help="text file, one prompt (or label) a line (default: the teacher's own "
           "prompts.txt or labels, else 100,000 composed from word lists)")
    option("--seed", type=int, default=0)
    option = parser.add_argument_group("optimisation").add_argument
    option("--steps", type=int, help=either["steps"])
    option("--batch", type=int, help=f"total over all processes {either['batch']}")
    option("--micro-batch", type=int, help="what one device holds at once; halve it if you run out of memory "
           "(default: its whole share for an embedded teacher, up to 4 for another)")
    option("--lr", type=float, help=f"peak {either['lr']}")
    option("--warmup", type=int, help="steps of linear warm-up; also the critic's head start, the steps that it learns "
           f"before the student is matched {either['warmup']}")
    option("--decay", type=float, default=0.6, help="last part over which the rate falls linearly, before matching to "
           "--match-lr and then to zero; 0 keeps it constant (default: %(default)s)")
    option("--ema", type=float, help=f"decay of the averaged weights, which are the student {either['ema']}; "
           "0 keeps no average and saves its memory")
    option = parser.add_argument_group("method").add_argument
    option("--guidance", type=guidance_scale, help="w, 1 is no guidance: a number, or LO:HI to train one student for "
           f"the whole range {either['guidance']}; 1 for one without an empty condition")
    option("--negative-prompt", default="", help="what guidance leads away from; a label, for classes")
    option("--input-time", type=int, help="time at which the student's input is read, 1..T (default: T, as in the "
           f"paper; of an epsilon teacher the first whose noise is {INPUT_NOISE} times the signal, 600 of Stable "
           "Diffusion's, 423 of DDPM's)")
    option("--num-steps", type=int, default=10, help="K: a bootstrap step spans delta = T / K (default: %(default)s)")
    option("--solver", choices=["euler", "heun"], default="heun", help="heun: a better target from a second teacher "
           "call; with euler, double K (default: %(default)s)")
    option("--weight", type=float, default=0.0, help="power p of a sample's weight (1 - r)^p: 0, as in the paper, "
           "measures errors in units of the clean image; 2 of the signal, for the clean end (default: %(default)s)")
    option("--boundary-weight", type=float, default=0.1, help="beta; 0 leaves the noise end loose (default: 0.1)")
    option = parser.add_argument_group("matching the teacher's distribution, which is not in the paper").add_argument
    option("--match", type=float, default=16.0, help="weight of the matching loss beside BOOT's, in steps that have "
           "both: for pictures as sharp and varied as the teacher's; 0 is the paper alone, and spares the critic, 16 "
           "bytes a parameter (default: %(default)s)")
    option("--match-from", type=float, default=0.45, help="part of the run after which the student is matched: first "
           "it has to paint something (default: %(default)s)")
    option("--match-lr", type=float, help=f"rate from there on {either['match_lr']}; --lr, where that is less")
    option("--match-guidance", type=float, default=1.0, help="part of w - 1 that the teacher has in it: less gives "
           "more variety, more is truer to the prompt (default: %(default)s)")
    option("--match-until", type=float, default=0.7, help="part of T above which the teacher has no guidance in it; 1 "
           "costs variety (default: %(default)s)")
    option("--critic-lr", type=float, help="of the critic, which follows what the student paints: higher gives more "
           f"variety, lower is truer to the prompt {either['critic_lr']}")
    option("--critic-updates", type=int, default=1, help="steps of the critic to one that matches the student; more is "
           "steadier, and slower (default: %(default)s)")
    option = parser.add_argument_group("machine").add_argument
    option("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    option("--precision", choices=list(PRECISION), help="of the networks' passes; the ddpm teachers' epsilon wants "
           "fp16 or fp32 (default: bf16 on cuda, fp32 elsewhere)")
    option("--grad-checkpointing", action="store_true", help="memory for time: compute blocks twice, keep nothing")
    option("--save-every", type=int, help=f"steps between checkpoints {either['save_every']}")
    option("--sample-every", type=int, help=f"steps between pictures {either['sample_every']}; 0 makes none, and "
           "spares the teacher's fifty steps for them")
    option("--dry-run", action="store_true", help="load and check everything, print the plan, train nothing")

def guidance_scale(text):
    """A number, or the list of two that LO:HI stands for."""
    try:
        scales = [float(w) for w in text.split(":")]
    except ValueError:
        scales = []
    if len(scales) not in (1, 2) or not all(map(math.isfinite, scales)) or scales != sorted(set(scales)):
        raise argparse.ArgumentTypeError(f"--guidance {text} is neither a number nor LO:HI")
    return scales if len(scales) == 2 else scales[0]

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_options(parser)
    args = parser.parse_args(argv)
    args.negative_prompt = readable(args.negative_prompt)
    args.out = args.out or Path("runs") / last_name(args.teacher)
    if args.match_lr is None and args.lr is not None:
        args.match_lr = min(args.lr, default("match_lr", args.teacher))
    for name in set(DEFAULTS) - {"micro_batch", "guidance"}:        # split_batch and settle choose those two
        if getattr(args, name) is None:
            setattr(args, name, default(name, args.teacher))
    if not args.match:
        args.match_lr = 0.0                                 # BOOT alone ends at a rate of zero
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            parser.error(f"--{name.replace('_', '-')} {value} is not supported: {low} to {high}")
    return args

def torchrun():
    """(rank, number of processes, rank on this machine). Where a part of torchrun's environment is missing, the rest is
    what a cluster left there, and this is the only process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = ", ".join(name for name in names if not os.environ.get(name))
    size = os.environ.get("WORLD_SIZE") or "1"
    if missing and size != "1":
        warnings.warn(f"WORLD_SIZE={size} is not torchrun's, without {missing}: one process trains alone", stacklevel=2)
    if missing or size == "1":
        return 0, 1, 0
    with parsing("RANK, WORLD_SIZE and LOCAL_RANK"):
        rank, world, local_rank = (int(os.environ[name]) for name in names[:3])
        if not 0 <= rank < world:
            raise ValueError(f"there is no process {rank} of {world}")
        return rank, world, local_rank

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
    start = None
    while start is None or not store.check([f"{start}/{own}"]):
        start = store.get("start").decode()                             # perhaps that of a first process that is dead
        store.set(f"{start}/{rank}", own)
        time.sleep(0.1)
    return start

def split_batch(args, world):
    """(local batch, micro batch): how many of a step's samples are one process's, and how many it holds at once."""
    if args.batch % world:
        raise BadInput(f"--batch {args.batch} does not divide over {world} processes")
    local_batch = args.batch // world
    micro_batch = args.micro_batch or math.gcd(local_batch, default("micro_batch", args.teacher) or local_batch)
    if local_batch % micro_batch:
        raise BadInput(f"--micro-batch {micro_batch} does not divide {local_batch}, each process's share of --batch")
    return local_batch, micro_batch

def settle(args, teacher):
    """Fill in the options whose default depends on the teacher, and check those whose limits do. Raises BadInput."""
    teacher.set_negative_prompt(args.negative_prompt)       # first: it may be what makes guidance possible
    T, schedule = teacher.schedule.T, teacher.schedule
    if args.input_time is None:
        quieter = (schedule.lam(torch.arange(1, T)) < math.log(INPUT_NOISE)).sum().item()
        args.input_time = quieter + 1 if schedule.prediction == "epsilon" else T
    if args.guidance is None:
        args.guidance = 1.0 if teacher.uncond is None else default("guidance", args.teacher)
    if args.guidance == 1 and args.negative_prompt:
        warnings.warn("--negative-prompt has no effect with --guidance 1, which is no guidance", stacklevel=2)
    for name, value in (("--input-time", args.input_time), ("--num-steps", args.num_steps)):
        if not 1 <= value <= T:
            raise BadInput(f"{name} {value} is not supported: 1 to {T}")

def draw(seed, step, samples, shape, T, num_prompts, guidance):
    """Noises, times, prompt and guidance of a step's samples, each a pure function of (seed, step, sample): so a run
    depends neither on the number of processes nor on where it was interrupted. Returns the numbers of B prompts, eps
    (B, *shape), t (B,) uniform on 1..T, w (B,), and for matching n (B, *shape) and tau (B,)."""
    prompt, eps, t, w, n, tau = [], [], [], [], [], []
    lo, hi = guidance if isinstance(guidance, list) else (guidance, guidance)
    for i in samples:
        digest = hashlib.blake2b(f"{seed} {step} {i}".encode(), digest_size=8).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)     # 63 bits: seeds are signed
        eps.append(torch.randn(shape, generator=rng))
        t.append(torch.randint(1, T + 1, (), generator=rng))
        prompt.append(torch.randint(num_prompts, (), generator=rng).item())
        w.append(lo + (hi - lo) * torch.rand((), generator=rng))
        n.append(torch.randn(shape, generator=rng))
        tau.append(match_time(torch.rand((), generator=rng), T))
    return prompt, *map(torch.stack, (eps, t, w, n, tau))

def match_time(u, T):
    """tau of a number u in [0, 1): whole, uniform."""
    lo, hi = (max(1, round(share * T)) for share in MATCH_TIMES)
    return (lo + u * (hi - lo + 1)).long().clamp(max=hi)

def select(condition, rows):
    """The condition of some of the samples."""
    return {name: value[rows] for name, value in condition.items()}

def autocast(device, dtype):
    """Mixed precision. Cast weights are not cached: casts made under no_grad would be reused, and give no gradient."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)

def learning_rate(step, args, match_from):
    """Linear warm-up, constant, linear decay over the last part to the rate of matching; from the step match_from on,
    that rate, decaying likewise to zero."""
    if step < match_from:
        warm = (step + 1) / max(args.warmup, 1)
        tail = (match_from - step) / (args.decay * match_from) if args.decay else 1.0
        return min(args.lr * warm, args.match_lr + (args.lr - args.match_lr) * min(1.0, tail))
    tail = (args.steps - step) / (args.decay * (args.steps - match_from)) if args.decay else 1.0
    return args.match_lr * min(1.0, tail)

def new_optimizer(params, lr, device):
    """AdamW whose state exists from the start, so that resume has tensors to fill. The loop sets the student's rate
    and beta_1 in every step."""
    # fused on a GPU, where the default needs temporaries of another 4 bytes a parameter
    optimizer = torch.optim.AdamW(params, lr, betas=(MATCH_BETA_1, 0.99), weight_decay=0.0, fused=device.type == "cuda")
    for p in params:
        optimizer.state[p] = {"step": torch.tensor(0.0, device=device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer

def training_state(network, optimizer, prefix=""):
    """All tensors of a network that resume needs, by name: weights, Adam's state. Random numbers need none: see draw.
    """
    state = {}
    for name, p in network.named_parameters():
        state[f"{prefix}network.{name}"] = p.detach()
        state |= {f"{prefix}{key}.{name}": tensor for key, tensor in optimizer.state[p].items()}
    return state

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
        yield

def remove(*paths):
    for path in paths:
        with contextlib.suppress(OSError):                  # a folder, or what Windows holds open
            path.unlink()

def remove_empty(*folders):
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()

def save(out, student, state, step, options):
    """What resume needs, with the options that made it; then the student, so that there is none without its state."""
    if broken := not_finite(state):
        raise BadInput(f"{broken} is not finite after step {step}; what {out} holds is whole: lower --lr, "
                       "--match-lr or --critic-lr, in another --out")
    tensors = {name: tensor.to("cpu").contiguous() for name, tensor in state.items()}
    metadata = {"step": str(step), "options": json.dumps(options)}
    write_file(out / STATE, lambda path: save_file(tensors, path, metadata))
    save_student(out / "student", student, step=str(step))

def saved_step(path):
    """The step, a text, in the metadata of a file of tensors; None if there is no such file, or none that is whole."""
    with contextlib.suppress(BadInput), open_tensors(path) as file:
        return (file.metadata() or {}).get("step")

def check_options(out, options):
    """Raise BadInput if the folder holds what a run of these options must not replace: the state of another run, or a
    student whose state is gone. Before the first save, and for what may change between stretches, all are free."""
    for path in (out / STATE, *(out / "student" / name for name in (WEIGHTS, "config.json", "student.json"))):
        if path.is_dir():
            raise BadInput(f"{path} is a folder, in the way of a file")
    if not (out / STATE).exists():
        if (out / "student").exists():
            raise BadInput(f"{out} holds a student, but no state to go on from: move it away or choose another --out")
        return
    try:
        with open_tensors(out / STATE) as file, parsing(out / STATE):
            saved = dict(json.loads((file.metadata() or {})["options"]))
    except BadInput as error:
        raise BadInput(f"{error}; move {out} away to start anew") from None
    free = {"steps", "micro_batch", "grad_checkpointing", "device", "save_every", "sample_every"}
    if saved.get("fingerprint") == options["fingerprint"]:
        free.add("teacher")                                 # the same one, perhaps in another place
    differ = [f"{key} {saved.get(key)} there, {value} here" for key, value in options.items()
              if key not in free and saved.get(key) != value]
    if differ:
        raise BadInput(f"{out} holds another run ({'; '.join(differ)}): repeat its options or choose another --out")

def resume(path, state):
    """Fill the state, tensor by tensor, with what save wrote, and return its step; 0 if nothing was saved."""
    if not path.exists():
        return 0
    tensors, metadata = read_tensors(path)
    theirs, ours = ({name: tensor.shape for name, tensor in some.items()} for some in (tensors, state))
    wrong = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    wrong += [] if metadata.get("step", "").isdecimal() else [f"step {metadata.get('step')}"]
    if wrong:
        raise BadInput(f"{path} is not this run's checkpoint ({', '.join(wrong[:4])}): move its folder away to start "
                       "anew")
    for name, tensor in state.items():
        tensor.copy_(tensors.pop(name))
    if broken := not_finite(state):
        raise BadInput(f"{path} is damaged: {broken} is not finite: move its folder away to start anew")
    return int(metadata["step"])

def not_finite(state):
    """The name of a tensor with a value that is not finite, which would spoil the student from then on; or None."""
    return next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)

def check_space(out, state, student):
    """Raise BadInput if the disk cannot hold a checkpoint, of which a file is whole before it replaces the last one.
    state, student: bytes of its files. Returns how much it takes, as a text."""
    files = [path for folder in (out / "state", out / "student") for path in folder.glob("*.safetensors")]
    need = 2 * state + student - sum(path.stat().st_size for path in files)
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    takes = f"{(state + student) / 1e9:.2f} GB on disk, and {state / 1e9:.2f} more while it is replaced"
    if need > free:
        raise BadInput(f"no room in {out}, where {free / 1e9:.2f} GB are free: a checkpoint takes {takes}")
    return takes

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

@torch.no_grad()
def paint(sampler, teacher, eps, condition, micro_batch):
    """The pictures of a sampler (eps, **condition) -> latents, as many at once as training holds: PIL images; or [] and
    a warning, if they are not finite, which is no reason to end a run."""
    images = []
    try:
        for first in range(0, len(eps), micro_batch):
            rows = slice(first, first + micro_batch)
            images += to_pil(teacher.decode(sampler(eps[rows], **select(condition, rows)), range(len(eps))[rows]))
    except BadInput as error:
        warnings.warn(f"no pictures: {error}", stacklevel=2)
        return []
    return images

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

def main():
    args = parse_args()
    rank, world, local_rank = torchrun()
    with hold(args.out) if rank == 0 and not args.dry_run else contextlib.nullcontext():
        train(args, rank, world, local_rank)

def train(args, rank, world, local_rank):
    # ---- Processes: one, or those of torchrun, each with an equal share of the batch
    local_batch, micro_batch = split_batch(args, world)
    device = pick_device(args.device, local_rank)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = PRECISION[args.precision]
    grad_scale = 2.0**10 if args.precision == "fp16" else 1.0               # fp16 flushes less than 6e-8 to zero
    warnings.showwarning = warn_once if rank == 0 else lambda *_: None
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        join(rank, world, "nccl" if device.type == "cuda" else "gloo")

    # ---- Teacher
    teacher = load_teacher(args.teacher, device, dtype)
    settle(args, teacher)
    prompts = training_prompts(teacher, args.prompts)
    schedule, delta = teacher.schedule, round(teacher.schedule.T / args.num_steps)
    num_boundary = len(range(0, args.batch, BOUNDARY_EVERY))                # samples of a step with a boundary loss
    options = {name: value for name, value in vars(args).items() if name not in ("dry_run", "out")}
    options |= {"teacher": teacher.spec, "fingerprint": teacher.fingerprint,
                "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]}
    if rank == 0:
        check_options(args.out, options)

    # ---- Student: the network that is trained, and the one that is saved, the moving average (ema) of its weights
    student = new_student(teacher, args.input_time, args.guidance)
    averaged = student                                                      # with --ema 0 they are the same
    if args.ema:
        averaged = Student(copy.deepcopy(student.network), teacher, args.input_time, args.guidance)
    student.network.requires_grad_(True)
    student.network.checkpointing = args.grad_checkpointing
    params = list(student.network.parameters())
    optimizer = new_optimizer(params, args.lr, device)

    # ---- Critic: the third network, which learns what the student paints, to tell it from what the teacher would
    critic_params = []
    if args.match:
        critic = new_critic(student)
        critic.network.requires_grad_(True)
        critic.network.checkpointing = teacher.unet.checkpointing = args.grad_checkpointing
        critic_params = list(critic.network.parameters())
        critic_optimizer = new_optimizer(critic_params, args.critic_lr, device)
        limited = functools.partial(limited_guidance, teacher.denoise, share=args.match_guidance,
                                    until=args.match_until * schedule.T)

    # ---- Resume: the first process reads the checkpoint, and the others get it from there
    state = training_state(student.network, optimizer)
    if args.ema:
        state |= {f"ema.{name}": p for name, p in averaged.network.named_parameters()}
    if args.match:
        state |= training_state(critic.network, critic_optimizer, "critic_")
    step = torch.zeros((), dtype=torch.int64, device=device)
    if rank == 0:
        step.fill_(resume(args.out / STATE, state))
    if world > 1:
        for tensor in (step, *state.values()):
            dist.broadcast(tensor, 0)
    start = done = step.item()
    critic_from = match_from = args.steps
    if args.match:
        critic_steps = int(critic_optimizer.state[critic_params[0]]["step"])
        match_from = start - critic_steps + args.warmup     # the critic has a head start of --warmup steps
        if critic_steps <= args.warmup:                     # until matching has begun, other --steps move it
            match_from = max(round(args.match_from * args.steps), match_from)
        critic_from = match_from - max(0, args.warmup - critic_steps)
        if match_from >= args.steps and rank == 0:
            warnings.warn(f"{args.steps} steps end before the student is matched, after {match_from}: give more "
                          "--steps, or less --match-from or --warmup, or --match 0 for BOOT alone", stacklevel=2)
    if rank == 0:
        takes = check_space(args.out, sum(t.nbytes for t in state.values()), sum(p.nbytes for p in params))
        frozen = [part for part in (teacher.unet, teacher.vae, teacher.text_encoder) if part is not None]
        held = sum(t.nbytes for t in (*state.values(), *params, *critic_params))            # with as many gradients
        held += sum(p.nbytes for part in frozen for p in part.parameters())
        matched = f", matched after {match_from} with a critic as large" if match_from < args.steps else ""
        resuming = f", {'resuming' if start < args.steps else 'already'} at step {start}" if start else ""
        print(f"{args.teacher} -> {args.out} on {world} x {device} in {args.precision}: "
              f"{sum(p.numel() for p in params) / 1e6:.1f} M parameters, {len(prompts)} prompts, guidance "
              f"{args.guidance}, input time {args.input_time}, {args.steps} steps of {args.batch}, {micro_batch} at "
              f"once{matched}{resuming}; {held / 1e9:.2f} GB of memory in each process, and what a pass needs; "
              f"a checkpoint takes {takes}", flush=True)
    if args.dry_run:
        return
    stop = Stop(speaks=rank == 0)
    if rank == 0:
        write_json(args.out / "config.json", options)       # for people
        if start and saved_step(args.out / "student" / WEIGHTS) != str(start):          # a crash left an older one
            save_student(args.out / "student", averaged, step=str(start))
        began = time.time() - rewind_log(args.out / "log.jsonl", start)

    # ---- What is painted: fixed prompts and noises, the teacher's 50 steps above the student's one; by every process, or
    # the others would have to wait for the first one
    if args.sample_every and start < args.steps:
        shown_eps = noise(range(8), teacher.shape).to(device)
        shown = teacher.encode([prompts[k * len(prompts) // 8] for k in range(8)])
        in_one_step = functools.partial(averaged, t=0, w=student.pick_guidance())
        in_fifty = functools.partial(teacher.solve, grid=schedule.grid(50), w=student.pick_guidance())
        with autocast(device, dtype):
            teacher_row = paint(in_fifty, teacher, shown_eps, shown, micro_batch)

    # ---- Loop
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=rank > 0,
               mininterval=1 if sys.stderr.isatty() else 60)
    for step in bar:
        lr = learning_rate(step, args, match_from)
        beta_1 = BETA_1 if step < match_from else MATCH_BETA_1
        optimizer.param_groups[0] |= {"lr": lr, "betas": (beta_1, 0.99)}
        for p in (*params, *critic_params):
            p.grad = None
        log = {"bootstrap": torch.zeros(BINS, device=device), "count": torch.zeros(BINS, device=device),
               "boundary": torch.zeros((), device=device), "stop": torch.tensor(float(stop.asked), device=device),
               "matching": torch.zeros((), device=device), "critic": torch.zeros((), device=device)}
        critic_learns = step >= critic_from
        matches = step >= match_from and (step + 1) % args.critic_updates == 0
        on_path = step < match_from or (matches and (step + 1) // args.critic_updates % PATH_EVERY == 0)
        student_learns = on_path or matches                 # or else it is a step of the critic alone

        for first in range(rank * local_batch, (rank + 1) * local_batch, micro_batch):
            # draw
            samples = range(first, first + micro_batch)
            prompt, *drawn = draw(args.seed, step, samples, teacher.shape, schedule.T, len(prompts), args.guidance)
            eps, t, w, n, tau = (tensor.to(device) for tensor in drawn)
            s = (t - delta).clamp(min=0)
            condition = teacher.encode([prompts[k] for k in prompt])
            if args.guidance != 1:
                condition["w"] = w                          # w = 1 needs no unconditional pass

            # losses: L = L_BS + beta * L_BC + match * L_M, each backward on its own: one loss's graphs are in memory at
            # a time, of L_M those of student, teacher and critic
            if on_path:
                weight = (1 - contraction(t, s, schedule)).float() ** args.weight
                with autocast(device, dtype):
                    L_BS = bootstrap_loss(student, teacher.denoise, eps, t, s, schedule, args.solver, weight,
                                          **condition)
                (grad_scale / args.batch * L_BS.sum()).backward()
                bins = schedule.index(t) * BINS // schedule.T               # (B,): times 1..T to 0..BINS - 1
                log["bootstrap"].index_add_(0, bins, L_BS.detach())
                log["count"].index_add_(0, bins, torch.ones_like(w))
            rows = [row for row, sample in enumerate(samples) if on_path and sample % BOUNDARY_EVERY == 0]
            if rows and args.boundary_weight:
                with autocast(device, dtype):
                    L_BC = boundary_loss(student, teacher.denoise, eps[rows], schedule, **select(condition, rows))
                (grad_scale * args.boundary_weight * (L_BC.sum() / num_boundary)).backward()
                log["boundary"] += L_BC.detach().sum() / num_boundary

            # matching: L_M of the student's picture x, and L_C of the critic, which has to learn x (its second pass at
            # x_tau: the first one's graph, and the student's, are gone)
            if critic_learns:
                with autocast(device, dtype), torch.set_grad_enabled(matches):
                    x = student(eps, 0, **condition)
            if matches:
                with autocast(device, dtype):
                    L_M = matching_loss(x, limited, critic.denoise, n, tau, schedule, **condition)
                (grad_scale * args.match / args.batch * L_M.sum()).backward()
                log["matching"] += L_M.detach().sum() / args.batch
            if critic_learns:
                with autocast(device, dtype):
                    L_C = critic_loss(x.detach(), critic, n, tau, schedule, **condition)
                (grad_scale / args.batch * L_C.sum()).backward()
                log["critic"] += L_C.detach().sum() / args.batch

        # reduce: sums over the processes; all of them come here in every step, or the others would wait forever
        learning = [*(params if student_learns else ()), *(critic_params if critic_learns else ())]
        if world > 1:
            for tensor in (*log.values(), *(p.grad for p in learning)):
                dist.all_reduce(tensor)

        # step
        if grad_scale != 1:
            for p in learning:
                p.grad.div_(grad_scale)
        losses, norms = {}, {}                              # those that this step has
        if on_path:
            losses |= {"bootstrap": log["bootstrap"].sum().item() / args.batch, "boundary": log["boundary"].item()}
        if matches:
            losses["matching"] = log["matching"].item()
        if student_learns:
            norms["grad_norm"] = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        if critic_learns:
            losses["critic"] = log["critic"].item()
            norms["critic_grad_norm"] = torch.nn.utils.clip_grad_norm_(critic_params, 1.0).item()
        if broken := [name for name, value in (losses | norms).items() if not math.isfinite(value)]:
            advice = f"what {args.out} holds is whole: lower --lr, --match-lr or --critic-lr, or take --precision bf16"
            advice += " or fp32, in another --out"
            if step == 0:
                advice = "no weight has changed yet, so that the teacher or its schedule is at fault"
                advice += ", or fp16: take --precision bf16 or fp32" if args.precision == "fp16" else ""
            drawn = (f"{name} {[round(v, 2) for v in values[:16].tolist()]}, ..." for name, values in
                     (("times", t), ("matching times", tau), ("guidance", w)))
            raise BadInput(f"{' and '.join(broken)} not finite at step {step} ({'; '.join(drawn)}); {advice}")
        if student_learns:
            optimizer.step()
        if critic_learns:
            critic_optimizer.step()
        done = step + 1

        # average
        if args.ema and student_learns:
            ema_decay = min(args.ema, done / (done + 9))    # shorter memory at first, to forget the untrained weights
            for average, p in zip(averaged.network.parameters(), params):
                average.lerp_(p.detach(), 1 - ema_decay)

        # log
        last = done == args.steps
        stopping = log["stop"].item() > 0
        if rank == 0 and (done % 10 == 0 or last):
            bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
            by_time = [total / n if n else None for total, n in zip(log["bootstrap"].tolist(), log["count"].tolist())]
            line = {"step": done, **losses, **norms, "lr": lr, "seconds": round(time.time() - began, 1),
                    "bootstrap_by_time": by_time}
            with open(args.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

        # save
        if rank == 0 and (done % args.save_every == 0 or last or stopping):
            save(args.out, averaged, state, done, options)

        # paint
        if args.sample_every and (done % args.sample_every == 0 or last):
            with autocast(device, dtype):
                student_row = paint(in_one_step, teacher, shown_eps, shown, micro_batch)
            if rank == 0 and teacher_row and student_row:
                grid = image_grid([teacher_row, student_row], 96)
                write_file(args.out / "samples" / f"step_{done}.png", functools.partial(grid.save, format="PNG"))
        if stopping:
            break

    if world > 1:
        dist.destroy_process_group()
    if rank == 0 and done < args.steps:
        print(f"stopped at step {done}; the same command goes on")
    elif rank == 0:
        out = shlex.quote(str(args.out))
        prompt = f" --{teacher.takes} {shlex.quote(prompts[0])}" if teacher.takes else ""
        print(f"the student is in {args.out / 'student'}\n  python sample.py --student {out}{prompt}")
        if is_embedded(args.teacher):
            print(f"  python -m tools.evaluate --student {out}")
    if stop.interrupted:
        sys.exit(130)                                       # so that `train && evaluate` ends here

if __name__ == "__main__":
    command(main)
