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
import functools
import hashlib
import json
import math
import shlex
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import EMBEDDED, HUB, WEIGHTS, BadInput, command, is_embedded, last_name, write_file, write_json
from matching import critic_loss, limited_guidance, matching_loss
from plan import PYTHON, Plan, report
from run import (MEETING, WAIT, Saver, Stop, check_options, check_space, full, hold, join, load, local, newest,
                 peak_memory, reduce_in_backward, rewind_log, saved_step, shard, spare_memory, together, warn_once,
                 whole_tensors)
from signal_ode import boot_losses, contraction, noisy
from student import Student, let_learn, new_critic, new_student, save_student
from teacher import (PRECISION, image_grid, load_teacher, noise, pick_device, readable, to_pil, torchrun,
                     training_prompts)

INPUT_NOISE = 2.27          # an epsilon student's input time i is where sigma_i / alpha_i is this: found by trial
BINS = 8                    # the log has the bootstrap loss of each eighth of the times 1..T
MICRO_BATCHES = (16, 8, 4, 2, 1)        # on a GPU, where --micro-batch is not given: the first that its memory allows
FEW_PROMPTS = 2**11         # or fewer are encoded once
LOG_EVERY = 10              # steps; only then does the host wait for the device
BOUNDARY_EVERY = 4          # every 4th sample has a boundary loss too: it is learned fast, and costs 5 passes
PATH_EVERY = 5              # of the student's steps, once it is matched, every 5th still has BOOT's losses
BETA_1 = 0.9                # Adam's, of BOOT
MATCH_BETA_1 = 0.0          # of matching: with momentum the critic lags behind the student
MATCH_TIMES = 0.02, 0.98    # tau is drawn between these, times T
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
           "(default: its whole share for an embedded teacher; else up to 16 on a GPU with the memory, or up to 4)")
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
    option("--shard", action="store_true", help="split networks and their state over the processes (FSDP), where one "
           "device has no memory for all of them")
    option("--save-every", type=int, help=f"steps between checkpoints {either['save_every']}")
    option("--sample-every", type=int, help=f"steps between pictures {either['sample_every']}; 0 makes none, and "
           "spares the teacher's fifty steps for them")
    option("--dry-run", action="store_true", help="load and check everything, print what it takes, train nothing")

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

def split_batch(args, world):
    """(local batch, micro batch): how many of a step's samples are one process's, and how many it holds at once."""
    if args.batch % world:
        near = args.batch // world * world
        fits = f"{near} or {near + world}" if near else world
        raise BadInput(f"--batch {args.batch} does not divide over {world} processes: {fits} does")
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

def to_device(tensor, device):
    """There, without waiting for what the device still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

def autocast(device, dtype):
    """Mixed precision. Cast weights are not cached: casts made under no_grad would be reused, and give no gradient."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)

def boundary_samples(args, first):
    """Which of the samples first, first + 1, ... of a step have a boundary loss."""
    return slice(-first % BOUNDARY_EVERY, None, BOUNDARY_EVERY) if args.boundary_weight else slice(0)

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
    # fused, for the default is slower and needs temporaries, on a GPU of another 4 bytes a parameter
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(params, lr, betas=(MATCH_BETA_1, 0.99), weight_decay=0.0, fused=fused)
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

def what_broke(broken, step, args, teacher, num_prompts):
    """The sentence with which a run ends whose losses or norms are not finite: which, where, and what to do."""
    advice = f"what {args.out} holds is whole: lower --lr, --match-lr or --critic-lr, or take --precision bf16"
    advice += " or fp32, in another --out"
    if step == 0:
        advice = "no weight has changed yet, so that the teacher or its schedule is at fault"
        advice += ", or fp16: take --precision bf16 or fp32" if args.precision == "fp16" else ""
    samples, T = range(min(16, args.batch)), teacher.schedule.T
    _, _, t, w, _, tau = draw(args.seed, step, samples, teacher.shape, T, num_prompts, args.guidance)
    drawn = (f"{name} {[round(v, 2) for v in values.tolist()]}, ..." for name, values in
             (("times", t), ("matching times", tau), ("guidance", w)))
    return f"{' and '.join(broken)} not finite at step {step} ({'; '.join(drawn)}); {advice}"

def main():
    args = parse_args()
    rank, world, local_rank = torchrun()
    held = hold(args.out) if rank == 0 and not args.dry_run else contextlib.nullcontext()
    with held, ThreadPoolExecutor(1) as executor:           # writes checkpoints: what is begun is finished in any case
        train(args, rank, world, local_rank, executor)

def train(args, rank, world, local_rank, executor):
    # ---- Processes: one, or those of torchrun, each with an equal share of the batch
    local_batch, micro_batch = split_batch(args, world)
    device = pick_device(args.device, local_rank)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = PRECISION[args.precision]
    mixed = functools.partial(autocast, device, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")    # fp16 flushes below 6e-8 to zero
    warnings.showwarning = warn_once if rank == 0 else lambda *_: None
    warnings.filterwarnings("ignore", "torch.distributed is disabled")      # one process saves without it
    if args.shard and world == 1:
        raise BadInput("--shard splits the networks over several processes: start it with torchrun")

    # ---- Teacher
    teacher = load_teacher(args.teacher, device, dtype)
    settle(args, teacher)
    prompts = training_prompts(teacher, args.prompts)
    schedule, delta = teacher.schedule, round(teacher.schedule.T / args.num_steps)
    num_boundary = len(range(0, args.batch, BOUNDARY_EVERY))                # samples of a step with a boundary loss
    options = {name: value for name, value in vars(args).items() if name not in ("dry_run", "out")}
    options |= {"teacher": teacher.spec, "fingerprint": teacher.fingerprint,
                "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]}

    # ---- Resume, first part: which checkpoint; the first process looks
    start, folder, student_is_saved = 0, None, True
    if rank == 0:
        start, folder, saved = newest(args.out)
        check_options(args.out, options, saved)
        if folder:                                          # a crash leaves an older student
            student_is_saved = saved_step(args.out / "student" / WEIGHTS) == str(start)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        join(rank, world, "nccl" if device.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo", timeout=WAIT)              # for what the host has to know
        told = [start, folder, student_is_saved, options]
        with together(rank):
            dist.broadcast_object_list(told, 0, device=device)
        start, folder, student_is_saved, theirs = told
        if theirs != options:
            raise BadInput(f"process {rank} has other options or another teacher than the first one: {options}")

    # ---- Student: the network that is trained, and the one that is saved, the moving average (ema) of its weights
    student = new_student(teacher, args.input_time, args.guidance)
    averaged = student                                                      # with --ema 0 they are the same
    if args.ema:
        averaged = Student(copy.deepcopy(student.network), teacher, args.input_time, args.guidance)
    let_learn(student.network)
    student.network.checkpointing = args.grad_checkpointing
    if args.shard:
        shard(teacher.unet, device, dtype)
        shard(student.network, device, dtype)
        if args.ema:
            shard(averaged.network, device, dtype)
    params = [p for p in student.network.parameters() if p.requires_grad]
    optimizer = new_optimizer(params, args.lr, device)

    # ---- Critic: the third network, which learns what the student paints, to tell it from what the teacher would
    critic, critic_params = None, []
    if args.match:
        critic = new_critic(student)
        critic.network.requires_grad_(True)
        critic.network.checkpointing = teacher.unet.checkpointing = args.grad_checkpointing
        if args.shard:
            shard(critic.network, device, dtype)
        critic_params = list(critic.network.parameters())
        critic_optimizer = new_optimizer(critic_params, args.critic_lr, device)
        limited = functools.partial(limited_guidance, teacher.denoise, share=args.match_guidance,
                                    until=args.match_until * schedule.T)

    # ---- Conditions: encoded once, where there are few; in parts that are always the same, for the last bits' sake
    encoded = None
    if len(prompts) <= FEW_PROMPTS:
        parts = [teacher.encode(prompts[first:first + 64]) for first in range(0, len(prompts), 64)]
        encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # ---- Resume, second part: every process reads what it holds
    state = training_state(student.network, optimizer)
    if args.ema:
        state |= {f"ema.{name}": p for name, p in averaged.network.named_parameters()}
        averages = [local(p) for p in averaged.network.parameters()]
        weights = [local(p.detach()) for p in student.network.parameters()]
    if args.match:
        state |= training_state(critic.network, critic_optimizer, "critic_")
        state["critic_steps"] = critic_steps = torch.tensor(0)
    if scaler.is_enabled():
        state["scaler"] = scaling = torch.tensor([scaler.get_scale(), 0.0])
    if folder:
        load(folder, state)
        if scaler.is_enabled():
            scale, good_steps = scaling.tolist()
            scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": int(good_steps)})
    if world > 1:
        with together(rank):                                # some read from a slower disk, or not from a cache
            dist.monitored_barrier(control, timeout=MEETING)
    done = start
    critic_from = match_from = args.steps
    if args.match:
        behind = args.warmup - int(critic_steps)            # the critic has a head start of --warmup steps
        match_from = start + behind
        if behind >= 0:                                     # until matching has begun, other --steps move it
            match_from = max(round(args.match_from * args.steps), match_from)
        critic_from = match_from - max(0, behind)
        if match_from >= args.steps and rank == 0:
            warnings.warn(f"{args.steps} steps end before the student is matched, after {match_from}: give more "
                          "--steps, or less --match-from or --warmup, or --match 0 for BOOT alone", stacklevel=2)

    # ---- Plan
    networks = {"student": student.network, "average": averaged.network if args.ema else None,
                "critic": critic and critic.network, "teacher": teacher.unet, "VAE": teacher.vae,
                "text encoder": teacher.text_encoder}
    networks = {name: list(network.parameters()) for name, network in networks.items() if network is not None}
    memory = {name: sum(local(p).nbytes for p in parameters) for name, parameters in networks.items()}
    memory["Adam"] = sum(local(tensor).nbytes for name, tensor in state.items() if "exp_avg" in name)
    memory["gradients"] = sum(p.nbytes for p in (*params, *critic_params))  # not sharded until the step's last pass
    saved = sum(tensor.nbytes for tensor in state.values())
    boundary = boundary_samples(args, 0)
    if args.micro_batch is None and not is_embedded(args.teacher) and device.type == "cuda":
        spare = 0.9 * torch.cuda.get_device_properties(device).total_memory - sum(memory.values())
        choices = [n for n in MICRO_BATCHES if local_batch % n == 0]
        fits = torch.tensor(Plan(student, critic, args, mixed).most_at_once(spare, choices, boundary, True))
        if world > 1:
            with together(rank):
                dist.all_reduce(fits, dist.ReduceOp.MIN, control)           # GPUs may differ
        micro_batch = fits.item()
    if rank == 0:
        matched = f", matched after {match_from} with a critic as large" if match_from < args.steps else ""
        resuming = f", {'resuming' if start < args.steps else 'already'} at step {start}" if start else ""
        print(f"{args.teacher} -> {args.out} on {world} x {device} in {args.precision}: "
              f"{sum(p.numel() for p in networks['student']) / 1e6:.1f} M parameters, {len(prompts)} prompts, guidance "
              f"{args.guidance}, input time {args.input_time}, {args.steps} steps of {args.batch}, {micro_batch} at "
              f"once{matched}{resuming}; {sum(memory.values()) / 1e9:.2f} GB of memory in each process, and what a "
              f"pass needs; a checkpoint takes {saved / 1e9:.2f} GB on disk, three of them while one is written",
              flush=True)
        if args.dry_run:
            plan, ends = Plan(student, critic, args, mixed), min(match_from, args.steps)
            matches = (args.steps - ends) // args.critic_updates
            steps = {"text": args.steps if encoded is None else 0, "BOOT": ends + matches // PATH_EVERY,
                     "matching": matches, "critic": matches,
                     "critic alone": args.steps - min(critic_from, args.steps) - matches}
            memory["prompts"] = sum(value.nbytes for value in (encoded or {}).values())
            memory["passes"] = plan.activations(micro_batch, boundary, local_batch > micro_batch)
            if device.type == "cpu":
                memory |= {"saving": 2 * saved / world if spare_memory() > 2 * saved else 0, "Python": PYTHON}
            print(f"samples of a step: {world} (processes) x {local_batch // micro_batch} (micro-batches) x "
                  f"{micro_batch}")
            print(report(plan.flops(boundary), steps, args.batch, networks, memory))
        check_space(args.out, saved, sum(p.nbytes for p in networks["student"]))
    if args.dry_run:
        return
    stop = Stop(speaks=rank == 0)
    if rank == 0:
        write_json(args.out / "config.json", options)       # for people
        began = time.time() - rewind_log(args.out / "log.jsonl", start)

    if not student_is_saved:
        with together(rank):
            tensors = whole_tensors(averaged, rank, copy=False)
        if rank == 0:
            save_student(args.out / "student", averaged, tensors, step=str(start))
    with together(rank):
        saver = Saver(args.out, options, rank, world, start, executor)

    # ---- What is painted: fixed prompts and noises, the teacher's 50 steps above the student's one. All processes do,
    # or they would have to wait for the first one
    if args.sample_every and start < args.steps:
        shown_eps = noise(range(8), teacher.shape).to(device)
        shown = teacher.encode([prompts[k * len(prompts) // 8] for k in range(8)])
        in_one_step = functools.partial(averaged, t=0, w=student.pick_guidance())
        in_fifty = functools.partial(teacher.solve, grid=schedule.grid(50), w=student.pick_guidance())
        with mixed():
            teacher_row = paint(in_fifty, teacher, shown_eps, shown, micro_batch)

    # ---- Loop
    unchecked, logged_step, logged_at = [], start, time.time()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=rank > 0,
               mininterval=1 if sys.stderr.isatty() else 60)
    for step in bar:
        lr = learning_rate(step, args, match_from)
        beta_1 = BETA_1 if step < match_from else MATCH_BETA_1
        optimizer.param_groups[0] |= {"lr": lr, "betas": (beta_1, 0.99)}
        for p in (*params, *critic_params):
            p.grad = None
        log = {"bootstrap": torch.zeros(BINS, device=device), "count": torch.zeros(BINS, device=device),
               "boundary": torch.zeros((), device=device), "matching": torch.zeros((), device=device),
               "critic": torch.zeros((), device=device)}
        critic_learns = step >= critic_from
        matches = step >= match_from and (step + 1) % args.critic_updates == 0
        on_path = step < match_from or (matches and (step + 1) // args.critic_updates % PATH_EVERY == 0)
        student_learns = on_path or matches                 # or else it is a step of the critic alone

        for first in range(rank * local_batch, (rank + 1) * local_batch, micro_batch):
            # draw
            samples = range(first, first + micro_batch)
            prompt, *drawn = draw(args.seed, step, samples, teacher.shape, schedule.T, len(prompts), args.guidance)
            eps, t, w, n, tau = (to_device(tensor, device) for tensor in drawn)
            s = (t - delta).clamp(min=0)
            condition = select(encoded, prompt) if encoded is not None else teacher.encode([prompts[k] for k in prompt])
            if args.guidance != 1:
                condition["w"] = w                          # w = 1 needs no unconditional pass

            # losses: L = L_BS + beta * L_BC + match * L_M, BOOT's backward before L_M is made: the graph of one pass of
            # the student is in memory at a time, for L_M with those of teacher and critic
            last_part = samples.stop == (rank + 1) * local_batch            # of the step
            if on_path:
                reduce_in_backward(student.network, last_part and not matches)
                weight = (1 - contraction(t, s, schedule)).float() ** args.weight
                with mixed():
                    L_BS, L_BC = boot_losses(student, teacher.denoise, eps, t, s, schedule,
                                             boundary_samples(args, first), args.solver, weight, **condition)
                loss = L_BS.sum() / args.batch + args.boundary_weight / num_boundary * L_BC.sum()
                scaler.scale(loss).backward()
                log["boundary"] += L_BC.detach().sum() / num_boundary
                bins = schedule.index(t) * BINS // schedule.T               # (B,): times 1..T to 0..BINS - 1
                log["bootstrap"].index_add_(0, bins, L_BS.detach())
                log["count"].index_add_(0, bins, torch.ones_like(w))

            # matching: L_M of the student's picture x, and L_C of the critic, which has to learn x
            if critic_learns:
                with mixed(), torch.set_grad_enabled(matches):
                    x = student(eps, 0, **condition)
            if matches:
                reduce_in_backward(student.network, last_part)
                reduce_in_backward(critic.network, False)
                with mixed():
                    L_M, h = matching_loss(x, limited, critic, n, tau, schedule, teacher.clip, **condition)
                scaler.scale(args.match / args.batch * L_M.sum()).backward()
                log["matching"] += L_M.detach().sum() / args.batch
            if critic_learns:
                reduce_in_backward(critic.network, last_part)
                with mixed():
                    if not matches:                         # or else L_M has asked it already
                        h = critic(noisy(x, n, tau, schedule), tau, **condition)
                    L_C = critic_loss(x.detach(), h, tau, schedule)
                scaler.scale(L_C.sum() / args.batch).backward()
                log["critic"] += L_C.detach().sum() / args.batch

        # reduce: sums over the processes; all of them come here in every step, or the others would wait forever
        learning = []
        if student_learns:
            learning.append((optimizer, params, "grad_norm"))
        if critic_learns:
            learning.append((critic_optimizer, critic_params, "critic_grad_norm"))
            critic_steps += 1
        stopping = torch.tensor(float(stop.asked or saver.failed()))
        if world > 1:
            with together(rank):
                for tensor in (*log.values(), *(p.grad for _, ps, _ in learning for p in ps if not args.shard)):
                    dist.all_reduce(tensor)
                dist.all_reduce(stopping, group=control)

        # step
        losses, norms = {}, {}                              # those that this step has
        if on_path:
            losses |= {"bootstrap": log["bootstrap"].sum() / args.batch, "boundary": log["boundary"]}
        if matches:
            losses["matching"] = log["matching"]
        if critic_learns:
            losses["critic"] = log["critic"]
        for adam, ps, name in learning:
            scaler.unscale_(adam)
            norms[name] = full(torch.nn.utils.clip_grad_norm_(ps, 1.0))
            scaler.step(adam)                               # but not where fp16 has overflowed
        scaler.update()
        done, last = step + 1, step + 1 == args.steps

        # average
        if args.ema and student_learns:
            ema_decay = min(args.ema, done / (done + 9))    # shorter memory at first, to forget the untrained weights
            torch._foreach_lerp_(averages, weights, 1 - ema_decay)

        # check: the host waits for the device only where something is to be written, or in the first step
        unchecked.append((step, losses | norms))
        logging = done % LOG_EVERY == 0 or last
        saving = done % args.save_every == 0 or last or stopping > 0
        painting = args.sample_every and (done % args.sample_every == 0 or last)
        if not (logging or saving or painting or step == start):
            continue
        for old_step, values in unchecked:
            broken = [name for name, value in values.items() if not value.isfinite()]
            if scaler.is_enabled() and scaler.get_scale() >= 1:
                broken = [name for name in broken if name not in norms]     # it only means another scale
            if broken:
                raise BadInput(what_broke(broken, old_step, args, teacher, len(prompts)))
        unchecked.clear()

        # log
        if rank == 0 and logging:
            figures = {name: value.item() if value.isfinite() else None for name, value in (losses | norms).items()}
            bar.set_postfix({name: f"{figures[name]:.4f}" for name in losses}, refresh=False)
            by_time = [total / n if n else None for total, n in zip(log["bootstrap"].tolist(), log["count"].tolist())]
            seconds = (time.time() - logged_at) / (done - logged_step)
            logged_step, logged_at = done, time.time()
            line = {"step": done, **figures, "lr": lr, "seconds": round(time.time() - began, 1),
                    "seconds_a_step": round(seconds, 4), "samples_per_s": round(args.batch / seconds, 2),
                    "memory_gb": round(peak_memory(device) / 1e9, 3), "bootstrap_by_time": by_time}
            with open(args.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

        # save
        if saving:
            if scaler.is_enabled():
                saved = scaler.state_dict()
                scaling.copy_(torch.tensor([saved["scale"], saved["_growth_tracker"]]))
            saver.save(state, averaged, done)

        # paint
        if painting:
            with mixed():
                student_row = paint(in_one_step, teacher, shown_eps, shown, micro_batch)
            if rank == 0 and teacher_row and student_row:
                grid = image_grid([teacher_row, student_row], 96)
                write_file(args.out / "samples" / f"step_{done}.png", functools.partial(grid.save, format="PNG"))
        if stopping:
            break

    saver.wait()
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
