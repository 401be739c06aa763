r"""Distil a diffusion teacher into a one-step student with BOOT: no images, only noise and prompts.

    python train.py                                             the embedded teacher on a laptop, minutes
    python train.py --teacher sd21 --out runs/mine              one GPU, or the CPU where there is none
    torchrun --nproc_per_node=8 train.py --teacher sd21         eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
        train.py --teacher sd21

Run the same command again to resume. Ctrl-C saves and stops.

The losses are in signal_ode.py and matching.py. Whatever is no part of the method is behind `run` (plumbing/run.py):

    run.begin                   lock the folder and find the last checkpoint
    run.restore                 read that checkpoint; returns the step to go on at
    run.ready                   say what begins, and note which network is saved and sampled
    run.add                     take a network into the run, saved and sharded if asked; returns its Adam if it learns
    run.steps                   the steps still to be made, none with --dry-run; ends early on Ctrl-C
    run.samples                 this process's samples of each step, as a range of indices in the whole batch
    run.encode                  the conditions of prompts, by their indices
    run.micro_batches           these samples in parts, which fit into memory: their range, and their rows of what is
                                given, on the run's device
    run.memory_permitting       if memory runs out inside, micro_batches clears the step's gradients and logged values,
                                and starts the step again with smaller ranges
    run.zero_grad               clear the step's gradients and logged values
    run.autocast                mixed precision: torch.autocast, without its cache of weights that were cast
    run.backward                a backward pass, scaled where fp16 needs it
    run.log, log_by_time        add to the step's logged values; log a loss of each sample separately by eighths of 0..T
    run.remember                values for the error message, in case a loss is not finite
    run.update, average         sum gradients over processes, clip each network's, step its Adam; move the average
    run.after                   stop if a loss is not finite; log, checkpoint and make samples where they are due
"""

import functools
import hashlib
import math
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))              # which PYTHONSAFEPATH leaves out

import torch

from matching import critic_loss, limited_guidance, matching_loss
from plumbing.configs import Number, check, check_limits
from plumbing.files import command, new_parser, number_or_range, parsing, user_path, user_spec
from plumbing.hub import EMBEDDED, HUB, is_embedded
from plumbing.processes import PRECISION
from plumbing.prompts import training_prompts
from plumbing.run import Run
from signal_ode import add_noise, boot_losses, mean_square
from student import REFINE_FROM, new_critic, new_student, save_student, set_trainable
from teacher import load_teacher

INPUT_NOISE = 2.27          # This is sigma / alpha at an epsilon student's input time. It was found by trial.
DECAY = 0.6                 # The rate falls linearly over the last 60% of BOOT's steps, and again of matching's.
MATCH_LR = 1 / 5            # The rate of matching and of refining is this share of --lr. BOOT's rate falls to it.
BOUNDARY_EVERY = 4          # Every 4th sample has a boundary loss. The boundary is learned fast, and its passes cost.
BOOT_EVERY = 5              # In matching, every 5th step still has BOOT's losses.
REFINE_SHARE = 0.1          # This last part of the steps after the beginning of matching refines the student instead.
REFINE_STEPS = 4            # The teacher refines the student's samples in so many steps.
BETA_1, BETA_2 = 0.9, 0.99  # These are Adam's betas of the student.
# This is the critic's beta_1, and the student's once the critic learns: momentum would lag behind the other network.
MATCH_BETA_1 = 0.0          # Without momentum the first moments need not be saved, see Run.needed_state.
MATCH_TIMES = 0.02, 0.98    # The time tau is drawn between these shares of T.
# These are the defaults for an embedded teacher, which is a miniature, and for a published one.
DEFAULTS = {
    "steps": (1300, 50_000), "batch": (32, 64), "lr": (5e-4, 1e-5), "warmup": (50, 500), "ema": (0.99, 0.9999),
    "guidance": (3.0, 7.5), "critic_lr": (5e-5, 1e-6), "every": (100, 500)}
LORA_DEFAULTS = {"lr": (3e-3, 1e-4), "critic_lr": (8e-4, 1e-4)}         # with --lora


# ----------------------------------------------------------------------------------------------------------- options
def add_options(parser):
    either = {name: f"(default: {embedded} for an embedded teacher, {published} for another)"
              for name, (embedded, published) in DEFAULTS.items()}
    option = parser.add_argument_group("what").add_argument
    option("--teacher", type=user_spec, default="tiny", help=f"{', '.join([*EMBEDDED, *HUB])}, a hub id, each with "
           "@REVISION if wished, or a folder in the diffusers layout (default: tiny)")
    option("--out", type=user_path, help="where everything goes; the same command resumes (default: runs/TEACHER)")
    option("--prompts", type=user_path, help="text file, one prompt (or label) a line, # begins a comment "
           "(default: the teacher's own prompts.txt or labels, else 100,000 composed from word lists)")
    option("--seed", type=int, default=0)
    option = parser.add_argument_group("optimisation").add_argument
    option("--steps", type=int, help=either["steps"])
    option("--batch", type=int, help=f"total over all processes {either['batch']}")
    option("--micro-batch", type=int, help="what one device holds at once (default: on a GPU the largest that fits, up "
           "to 16, and 4 on a CPU; for an embedded teacher the whole share)")
    option("--lr", type=float, help=f"peak rate; that of matching is a fifth of it {either['lr']}")
    option("--lora", type=int, default=0, metavar="RANK", help="learn additions of this rank, say 64, not all weights; "
           f"--lr is then {LORA_DEFAULTS['lr']}, --critic-lr {LORA_DEFAULTS['critic_lr']} (default: 0)")
    option("--warmup", type=int, help="steps of linear warm-up; also the critic's head start, the steps that it learns "
           f"before the student is matched {either['warmup']}")
    option("--ema", type=float, help=f"decay of the averaged weights, which are the student {either['ema']}; "
           "0 keeps no average, saves its memory, and refines nothing")
    option = parser.add_argument_group("method").add_argument
    option("--guidance", type=number_or_range, help="w, 1 is no guidance: a number, or LO:HI to train one student for "
           f"the whole range {either['guidance']}; 1 for a teacher without an empty condition")
    option("--negative-prompt", default="", help="what guidance leads away from; a label, for classes")
    option("--input-time", type=int, help="time at which the student's input is read, 1..T (default: T, as in the "
           f"paper; of an epsilon teacher the first whose noise is {INPUT_NOISE} times the signal, 600 of Stable "
           "Diffusion's, 423 of DDPM's)")
    option("--num-steps", type=int, default=10, help="K: a bootstrap step spans delta = T / K (default: %(default)s)")
    option("--solver", choices=["euler", "heun"], default="heun", help="heun: a better target from a second teacher "
           "call; with euler, double K (default: %(default)s)")
    option("--beta", type=float, default=0.1, help="weight of the boundary loss; 0 leaves the noise end loose "
           "(default: %(default)s)")
    option("--match", type=float, default=16.0, help="weight of the matching loss beside BOOT's, for samples as sharp "
           "and varied as the teacher's; 0 is BOOT alone, and spares the critic, 16 bytes a parameter "
           "(default: %(default)s)")
    option("--match-from", type=float, default=0.45, help="part of the run after which the student is matched: before, "
           "it has to make something worth matching (default: %(default)s)")
    option("--critic-lr", type=float, help="rate of the critic, which follows what the student makes: higher gives "
           f"more variety, lower is truer to the prompt {either['critic_lr']}")
    option = parser.add_argument_group("machine").add_argument
    option("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    option("--precision", choices=list(PRECISION), help="of the networks' passes; the ddpm teachers' epsilon wants "
           "fp16 or fp32 (default: bf16 on cuda, fp32 elsewhere)")
    option("--grad-checkpointing", action="store_true", help="memory for time: compute blocks twice, keep nothing")
    option("--shard", action="store_true", help="split networks and their state over the processes (FSDP), where one "
           "device has no memory for all of them")
    option("--every", type=int, help=f"steps between checkpoints, and between sheets of samples {either['every']}")
    option("--samples", type=int, default=8, help="samples on a sheet, below the teacher's in fifty steps; 0 makes no "
           "sheets, and spares those steps (default: %(default)s)")
    option("--dry-run", action="store_true", help="load and check everything, train nothing (see also tools.plan)")


def default(name, args):
    """The default for the teacher of these arguments, and for their --lora."""
    embedded, published = LORA_DEFAULTS[name] if args.lora and name in LORA_DEFAULTS else DEFAULTS[name]
    return embedded if is_embedded(args.teacher) else published


def parse_args(argv=None):
    parser = new_parser(__doc__)
    add_options(parser)
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / Path(args.teacher.partition("@")[0]).resolve().name
    for name in DEFAULTS:
        if getattr(args, name) is None and name != "guidance":       # that depends on the teacher: resolve_defaults
            setattr(args, name, default(name, args))
    with parsing("train.py"):
        check_limits(args)
        check("--lora", args.lora, "0 with --shard: a LoRA shares its weights", not (args.lora and args.shard))
    return args


def resolve_defaults(args, teacher):
    """Fill in the options whose default depends on the teacher, and check the options whose limits depend on it. Raises
    BadInput."""
    teacher.set_negative_prompt(args.negative_prompt)       # first: it may be what makes guidance possible
    T, schedule = teacher.schedule.T, teacher.schedule
    if args.input_time is None:
        quieter = (schedule.lam(torch.arange(1, T)) < math.log(INPUT_NOISE)).sum().item()
        args.input_time = quieter + 1 if schedule.prediction == "epsilon" else T
    if args.guidance is None:
        args.guidance = 1.0 if teacher.uncond is None else default("guidance", args)
    if args.guidance == 1 and args.negative_prompt:
        warnings.warn("--negative-prompt has no effect with --guidance 1, which is no guidance", stacklevel=2)
    with parsing("train.py"):
        check("--input-time", args.input_time, [Number(int, 1, T)])
        check("--num-steps", args.num_steps, [Number(int, 1, T)])


# -------------------------------------------------------------------------------------------- what a step is made of
def draw(seed, step, samples, shape, T, num_prompts, guidance):
    """Noises, times, prompt and guidance of a step's samples, each a pure function of (seed, step, sample). So a run
    depends neither on the number of processes nor on where it was interrupted. Returns the indices of B prompts, eps
    (B, *shape), t (B,) uniform on 1..T, w (B,), and for matching n (B, *shape) and tau (B,)."""
    prompt, eps, t, w, n, tau = [], [], [], [], [], []
    lo, hi = guidance if isinstance(guidance, list) else (guidance, guidance)
    first, last = (max(1, round(share * T)) for share in MATCH_TIMES)
    for i in samples:
        digest = hashlib.blake2b(f"{seed} {step} {i}".encode(), digest_size=8).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)     # 63 bits: seeds are signed
        eps.append(torch.randn(shape, generator=rng))
        t.append(torch.randint(1, T + 1, (), generator=rng))
        prompt.append(torch.randint(num_prompts, (), generator=rng).item())
        w.append(lo + (hi - lo) * torch.rand((), generator=rng))
        n.append(torch.randn(shape, generator=rng))
        tau.append((first + torch.rand((), generator=rng) * (last - first + 1)).long().clamp(max=last))
    return prompt, *map(torch.stack, (eps, t, w, n, tau))


def learning_rate(step, args, match_from, refine_from):
    """Linear warm-up to --lr; that rate; over the last 60% before match_from, a linear decay to the rate of matching.
    Matching begins at that rate, with a linear decay to zero over its last 60%, and so does refining. BOOT alone decays
    to zero."""
    match_lr = MATCH_LR * args.lr if args.match else 0.0
    if step < match_from:
        warm = (step + 1) / max(args.warmup, 1)
        tail = (match_from - step) / (DECAY * match_from)
        return min(args.lr * warm, match_lr + (args.lr - match_lr) * min(1.0, tail))
    begin, end = (match_from, refine_from) if step < refine_from else (refine_from, args.steps)
    return match_lr * min(1.0, (end - step) / (DECAY * (end - begin)))


def phases(args, start, critic_steps):
    """(critic_from, match_from, refine_from): the steps from which the critic learns, the student is matched, and it is
    refined. The critic learns alone for --warmup steps first, its head start. critic_steps: how many steps
    there were since it began, when the run goes on at the step `start`. If --steps is changed on resuming, a phase
    begins elsewhere; but matching does not if it has begun already."""
    if not args.match:
        return args.steps, args.steps, args.steps
    left = args.warmup - critic_steps                       # steps of the head start that are still to be made
    match_from = start + left                               # the earliest; if left < 0, the step at which it has begun
    if left >= 0:
        match_from = max(round(args.match_from * args.steps), match_from)
    if match_from >= args.steps:
        warnings.warn(f"{args.steps} steps end before matching begins, after {match_from}: give more --steps, or less "
                      "--match-from or --warmup, or --match 0 for BOOT alone", stacklevel=2)
    # The first step after the beginning of matching is always a matched one.
    refined = math.ceil(REFINE_SHARE * (args.steps - match_from - 1)) if args.ema else 0
    return match_from - max(0, left), match_from, args.steps - refined


# -------------------------------------------------------------------------------------------------------- the training
def train(args, run):
    """Distil. `run`: the plumbing.run.Run of these arguments."""
    teacher = load_teacher(args.teacher, run.device, run.dtype)
    resolve_defaults(args, teacher)
    prompts = training_prompts(teacher, args.prompts)
    run.begin(teacher, prompts)

    # Up to three networks start with the teacher's weights. The student learns; the average (EMA) of its weights is
    # what is kept; the critic learns to denoise the student's samples.
    student = new_student(teacher, args.input_time, args.guidance, args.lora)
    set_trainable(student.network)                          # all that an exported LoRA can hold in every program
    student_adam = run.add("student", student.network, args.lr, (BETA_1, BETA_2))
    run.add("teacher", teacher.unet, saved=False)           # it never learns, but may be sharded
    ema = student                                           # without an average, the student itself is kept
    if args.ema:
        ema = new_student(teacher, args.input_time, args.guidance, args.lora)
        run.add("ema", ema.network)
    critic_steps = torch.tensor(0)                          # how many steps there were since the critic began to learn
    if args.match:
        critic = new_critic(student)                        # the teacher's weights, and an input w if student has one
        critic_adam = run.add("critic", critic.network, args.critic_lr, (MATCH_BETA_1, BETA_2))
        run.state["critic_steps"] = critic_steps            # saved, and filled in place by run.restore

    start = run.restore()
    critic_from, match_from, refine_from = phases(args, start, int(critic_steps))
    run.ready(ema, functools.partial(save_student, args.out / "student", ema), f"lora {args.lora}, guidance "
              f"{args.guidance}, input time {args.input_time}, matching begins at {match_from}, refining {refine_from}")
    schedule, T = teacher.schedule, teacher.schedule.T
    delta = round(T / args.num_steps)                       # what a bootstrap step spans (not a step of training)
    num_boundary = len(range(0, args.batch, BOUNDARY_EVERY))
    limited_teacher = functools.partial(limited_guidance, teacher.denoise, schedule=schedule)

    for step in run.steps():
        # A run has four phases. First it has BOOT's losses alone. Then the critic learns beside them: its head start.
        # Then matching and critic have every step, and BOOT every 5th, to hold the student on the trajectory. In the
        # end the student is refined. (--match 0 has the first phase alone, --warmup 0 no head start.)
        refining = step >= refine_from
        matching = match_from <= step < refine_from
        boot = step < match_from or matching and (step + 1) % BOOT_EVERY == 0
        critic_learns = critic_from <= step < refine_from
        rate = learning_rate(step, args, match_from, refine_from)
        beta_1 = MATCH_BETA_1 if step >= critic_from else BETA_1
        student_adam.param_groups[0] |= {"lr": rate, "betas": (beta_1, BETA_2)}
        run.zero_grad()

        # All that a sample depends on: its prompt, noise eps, time t and scale w; for matching, n and tau.
        indices, *drawn = draw(args.seed, step, run.samples, teacher.shape, T, len(prompts), args.guidance)
        for samples, (eps, t, w, n, tau), condition in run.micro_batches(drawn, run.encode(indices)):
            with run.memory_permitting():
                s = (t - delta).clamp(min=0)
                if args.guidance != 1:                      # w guides the teacher. Student and critic take it as an
                    condition["w"] = w                      # input if --guidance is a range, and else ignore it.
                run.remember(times=t, matching_times=tau, guidance=w)

                # BOOT: g(eps, s) should be one solver step of the teacher's from g(eps, t) (L_BS). For every 4th sample
                # of the whole batch, g(eps, T) should be the teacher's prediction (L_BC).
                if boot:
                    first = -samples.start % BOUNDARY_EVERY             # the first such sample of this range
                    boundary = slice(first, None, BOUNDARY_EVERY) if args.beta else slice(0)
                    with run.autocast():
                        L_BS, L_BC = boot_losses(student, teacher.denoise, eps, t, s, schedule, boundary, args.solver,
                                                 **condition)
                    run.log_by_time(L_BS, t)
                    L_BS, L_BC = L_BS.sum() / args.batch, L_BC.sum() / num_boundary
                    run.backward(L_BS + args.beta * L_BC)
                    run.log(bootstrap=L_BS, boundary=L_BC)

                # Matching: teacher and critic should agree about the student's samples x. L_M has a gradient to x
                # alone, not to the critic. The critic's prediction h keeps its graph, for L_C.
                if matching:
                    with run.autocast():
                        x = student(eps, 0, **condition)
                        L_M, h = matching_loss(x, limited_teacher, critic, n, tau, schedule, teacher.clip, **condition)
                    L_M = L_M.sum() / args.batch
                    run.backward(args.match * L_M)
                    run.log(matching=L_M)                   # its value is || f - h ||^2 / mean |x - f|
                elif critic_learns:
                    with run.autocast():
                        with torch.no_grad():
                            x = student(eps, 0, **condition)
                        h = critic(add_noise(x, n, tau, schedule), tau, **condition)

                # The critic must know what the student makes now (L_C).
                if critic_learns:
                    with run.autocast():
                        L_C = critic_loss(x.detach(), h, tau, schedule).sum() / args.batch
                    run.backward(L_C)
                    run.log(critic=L_C)

                # Refining: the averaged student makes samples, and the teacher refines each in four steps. The student
                # learns to make the outcome in one. The average stays as it is, or refined would be refined again.
                if refining:
                    with run.autocast():
                        refined = ema.refine(eps, min(REFINE_STEPS, T // REFINE_FROM), **condition)
                        L_R = mean_square(student(eps, 0, **condition) - refined).sum() / args.batch
                    run.backward(L_R)
                    run.log(refining=L_R)
            x = h = L_BS = L_BC = L_M = L_C = L_R = None    # Frees the graphs, also of a try that ran out of memory.

        # One step of Adam for each network that has learned.
        critic_steps += step >= critic_from
        if critic_learns:
            run.update(student_adam, critic_adam)
        else:
            run.update(student_adam)
        # The average has a shorter memory at first, to forget the untrained weights. A refined student takes its place,
        # once it is done.
        if args.ema and not refining:
            run.average(ema.network, student.network, decay=min(args.ema, (step + 1) / (step + 10)))
        elif refining and step + 1 == args.steps:
            run.average(ema.network, student.network, decay=0.0)
        run.after(step)


def main():
    args = parse_args()
    with Run(args) as run:
        train(args, run)
    if run.interrupted:
        sys.exit(130)                                       # so that `train && evaluate` ends here


if __name__ == "__main__":
    command(main)
