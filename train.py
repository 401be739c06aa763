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
import datetime
import hashlib
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

from signal_ode import bootstrap_loss, boundary_loss, contraction
from teacher import (EMBEDDED, HUB, PRECISION, BadInput, command, is_embedded, load_teacher, new_student, noise,
                     pick_device, read_json, read_prompts, read_tensors, save_student, sheet, to_pil,
                     write_file, write_json)

# What suits a miniature and what suits a published teacher, where no option says otherwise
SMALL = {"steps": 1200, "batch": 32, "lr": 5e-4, "warmup": 50, "ema": 0.99, "save_every": 100, "sample_every": 100}
LARGE = {"steps": 50_000, "batch": 64, "lr": 1e-5, "warmup": 500, "ema": 0.9999, "save_every": 500,
         "sample_every": 1000}

INPUT_NOISE = 2.27          # sigma_i / alpha_i where the student of an epsilon teacher reads its input
BINS = 4                    # the bootstrap loss is logged by quarter of the time
BOUNDARY_EVERY = 4          # every 4th sample has a boundary loss: f(eps, T) is easily learned, costs as much


def either(name):
    return f"(default: {SMALL[name]} for an embedded teacher, {LARGE[name]} for another)"


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    g = p.add_argument_group("what")
    g.add_argument("--teacher", default="tiny",
                   help=f"{', '.join([*EMBEDDED, *HUB])}, a hub id, each with @REVISION if wished, or a folder in "
                        "the diffusers layout (default: tiny)")
    g.add_argument("--out", type=Path,
                   help="where everything goes; the same command resumes from it (default runs/TEACHER)")
    g.add_argument("--prompts", type=Path,
                   help="text file, one prompt (or label) a line (default: the teacher's own prompts.txt or "
                        "labels, else 100,000 composed from word lists)")
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, help=either("steps"))
    g.add_argument("--batch", type=int, help=f"total over all processes {either('batch')}")
    g.add_argument("--micro-batch", type=int,
                   help="what one device holds at once; halve it if you run out of memory "
                        "(default: its whole share for an embedded teacher, up to 4 for another)")
    g.add_argument("--lr", type=float, help=f"peak {either('lr')}")
    g.add_argument("--warmup", type=int, help=f"steps of linear warm-up {either('warmup')}")
    g.add_argument("--decay", type=float, default=0.6,
                   help="last part of the run over which the rate falls linearly to zero; "
                        "0 keeps it constant (default: %(default)s)")
    g.add_argument("--ema", type=float,
                   help=f"decay of the averaged weights, which are the student {either('ema')}; 0 keeps no average "
                        "and saves its memory")
    g = p.add_argument_group("method")
    g.add_argument("--guidance",
                   help="w, 1 is no guidance: a number, or LO:HI to train one student for the whole range "
                        "(default: 3 for an embedded teacher, 7.5 for another, 1 for one without an empty condition)")
    g.add_argument("--negative-prompt", default="", help="what guidance leads away from; a label, for classes")
    g.add_argument("--input-time", type=int,
                   help="time at which the student's input is read, 1..T (default: T, as in the paper; of an epsilon "
                        f"teacher the first whose noise is {INPUT_NOISE} times the signal, 600 of Stable "
                        "Diffusion's, 423 of DDPM's)")
    g.add_argument("--num-steps", type=int, default=10,
                   help="K: a bootstrap step spans delta = T / K (default: %(default)s)")
    g.add_argument("--solver", choices=["euler", "heun"], default="heun",
                   help="heun: a better target from a second teacher call; with euler, double K "
                        "(default: %(default)s)")
    g.add_argument("--weight", type=float, default=0.0,
                   help="power p of a sample's weight (1 - r)^p: 0 measures errors in units of the clean "
                        "image, as the paper does; 2 in units of the signal, which favours the clean end "
                        "(default: %(default)s)")
    g.add_argument("--boundary-weight", type=float, default=0.1,
                   help="beta; without it (0) nothing holds the noise end (default: %(default)s)")
    g = p.add_argument_group("machine")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    g.add_argument("--precision", choices=list(PRECISION),
                   help="of the networks' passes; the ddpm teachers' epsilon wants fp16 or fp32 "
                        "(default: bf16 on cuda, fp32 elsewhere)")
    g.add_argument("--grad-checkpointing", action="store_true",
                   help="compute layers twice instead of keeping what they made: memory for time")
    g.add_argument("--save-every", type=int, help=f"steps between checkpoints {either('save_every')}")
    g.add_argument("--sample-every", type=int,
                   help=f"steps between pictures {either('sample_every')}; 0 makes none, and spares the teacher's "
                        "fifty steps for them")
    g.add_argument("--dry-run", action="store_true",
                   help="load and check everything, print the plan, train nothing")
    args = p.parse_args()
    args.out = args.out or Path("runs") / Path(args.teacher.partition("@")[0]).resolve().name
    for name, value in (SMALL if is_embedded(args.teacher) else LARGE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.guidance is not None:
        try:
            lo_hi = [float(w) for w in args.guidance.split(":")]
        except ValueError:
            lo_hi = []
        if not (all(map(math.isfinite, lo_hi)) and (len(lo_hi) == 1 or len(lo_hi) == 2 and lo_hi[0] < lo_hi[1])):
            p.error(f"--guidance {args.guidance} is neither a number nor LO:HI")
        args.guidance = lo_hi if len(lo_hi) == 2 else lo_hi[0]
    for name, low, high in (("steps", 1, math.inf), ("batch", 1, math.inf), ("micro_batch", 1, math.inf),
                            ("lr", 0, math.inf), ("warmup", 0, math.inf), ("decay", 0, 1), ("ema", 0, 0.999999),
                            ("boundary_weight", 0, math.inf), ("weight", -10, 10), ("save_every", 1, math.inf),
                            ("sample_every", 0, math.inf)):
        value = getattr(args, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            p.error(f"--{name.replace('_', '-')} {value} is not supported: {low} to {high}")
    return args


def compose_prompts(num=100_000, seed=0):
    """num distinct prompts from the word lists of prompts.json, a function of the seed."""
    words, rng, prompts = read_json(Path(__file__).parent / "prompts.json"), random.Random(seed), {}
    while len(prompts) < num:                               # a dict keeps them distinct and in order
        scene = " ".join(map(rng.choice, rng.choice(words["scenes"])))
        prompts[rng.choice(words["styles"]).format(scene)] = True
    return list(prompts)


def prompt_source(teacher, path=None):
    """The prompts or labels to train on: those of a file, the teacher's own, or composed ones."""
    own = teacher.folder / "prompts.txt"
    if path and teacher.kind is None:
        raise BadInput(f"teacher {teacher.spec} is unconditional: --prompts has no meaning for it")
    if path or own.exists():
        prompts = read_prompts(path or own)
        if teacher.kind == "label":
            teacher.encode(prompts)                         # an unknown label is found now, not in an hour
        return prompts
    if teacher.kind == "label":
        return [name for name in teacher.labels if name]
    return compose_prompts() if teacher.kind == "text" else [""]


def draw(seed, step, indices, shape, T, num_prompts, guidance):
    """Noise, time, prompt and guidance of a step's samples, each a pure function of (seed, step, index).

    So a run depends neither on the number of processes nor on where it was interrupted. Returns eps
    (B, *shape), t (B,) uniform on 1..T, prompt indices (B,), w (B,).
    """
    eps, t, prompt, w = [], [], [], []
    lo, hi = guidance if isinstance(guidance, list) else (guidance, guidance)
    for i in indices:
        digest = hashlib.blake2b(f"{seed} {step} {i}".encode(), digest_size=8).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        eps.append(torch.randn(shape, generator=rng))
        t.append(torch.randint(1, T + 1, (), generator=rng))
        prompt.append(torch.randint(num_prompts, (), generator=rng))
        w.append(lo + (hi - lo) * torch.rand((), generator=rng))
    return torch.stack(eps), torch.stack(t), torch.stack(prompt), torch.stack(w)


def learning_rate(step, args):
    """Linear warm-up, constant, linear decay to zero over the last part."""
    tail = (args.steps - step) / (args.decay * args.steps) if args.decay else 1.0
    return args.lr * min(1.0, (step + 1) / max(args.warmup, 1), tail)


MOMENTS = ("exp_avg", "exp_avg_sq")


def training_state(weights, average, optimizer):
    """All that resume needs, by name: weights, average, Adam's moments. No generator: see draw()."""
    state = {f"weight.{name}": p.detach() for name, p in weights.items()}
    state |= {f"average.{name}": a for name, a in average.items()}
    return state | {f"{m}.{name}": optimizer.state[p][m] for name, p in weights.items() for m in MOMENTS}


def save_state(path, state, step):
    """One file of what training_state returns."""
    tensors = {name: tensor.to("cpu").contiguous() for name, tensor in state.items()}
    write_file(path, lambda p: save_file(tensors, p, {"step": str(step)}))


def load_state(path, state):
    """Restore save_state's file in place, tensor by tensor, and return its step."""
    tensors, metadata = read_tensors(path)
    try:
        for name, tensor in state.items():
            tensor.copy_(tensors.pop(name))
        return int(metadata["step"])
    except (KeyError, RuntimeError) as error:
        raise BadInput(f"{path} is not this run's checkpoint ({error}); move it away to start anew") from None


def check_config(path, config):
    """An earlier run's config.json here must say the same, but for what may change between two stretches."""
    free = {"steps", "micro_batch", "grad_checkpointing", "device", "save_every", "sample_every"}
    if path.exists():
        old = read_json(path)
        if old.get("fingerprint") == config["fingerprint"]:
            free.add("teacher")                             # the same one, in another place
        differ = [f"{k} {old.get(k)} there, {config[k]} here"
                  for k in config if k not in free and old.get(k) != config[k]]
        if differ:
            raise BadInput(f"{path.parent} holds another run ({'; '.join(differ)}): "
                           "repeat its options or choose another --out")


def rewind_log(path, step):
    """Drop what a killed run logged beyond its last checkpoint; returns the seconds it has taken so far."""
    written, kept = path.read_text().splitlines() if path.exists() else [], []
    for text in written:
        with contextlib.suppress(ValueError):               # a line torn in the middle
            kept += [line for line in [json.loads(text)] if line["step"] <= step]
    if len(kept) < len(written):
        write_file(path, lambda p: p.write_text("".join(json.dumps(line) + "\n" for line in kept)))
    return kept[-1]["seconds"] if kept else 0


def warn_once(message, *_):
    """Of warnings that begin alike the first is enough: a file of prompts may have thousands too long."""
    print(f"warning: {message} (others like it are not shown)", file=sys.stderr)
    warnings.filterwarnings("ignore", re.escape(str(message)[:20]))


def main():
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % world:
        raise BadInput(f"--batch {args.batch} does not divide over {world} processes")
    share, embedded = args.batch // world, is_embedded(args.teacher)
    micro = args.micro_batch or (share if embedded else math.gcd(share, 4))
    if share % micro:
        raise BadInput(f"--micro-batch {micro} does not divide {share}, each process's share of --batch")
    device = pick_device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype, scale = PRECISION[precision], 2.0**10 if precision == "fp16" else 1.0     # lest small gradients vanish

    teacher = load_teacher(args.teacher, device, dtype)
    schedule = teacher.schedule
    if args.input_time is None:
        quieter = (schedule.lam(torch.arange(1, schedule.T)) < math.log(INPUT_NOISE)).sum().item()
        args.input_time = quieter + 1 if schedule.prediction == "epsilon" else schedule.T
    for name, value in (("--input-time", args.input_time), ("--num-steps", args.num_steps)):
        if not 1 <= value <= schedule.T:
            raise BadInput(f"{name} {value} is not supported: 1 to {schedule.T}")
    if args.guidance is None:
        args.guidance = 1.0 if teacher.uncond is None else 3.0 if embedded else 7.5
    delta = round(schedule.T / args.num_steps)
    warnings.showwarning = warn_once if rank == 0 else lambda *_: None
    prompts = prompt_source(teacher, args.prompts)
    config = {k: v for k, v in vars(args).items() if k not in ("dry_run", "out")}
    config |= {"precision": precision, "teacher": teacher.spec, "fingerprint": teacher.fingerprint,
               "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]}
    check_config(args.out / "config.json", config)

    student = new_student(teacher, args.input_time, args.guidance, args.negative_prompt)
    network = student.network.requires_grad_(True)
    network.checkpointing = args.grad_checkpointing
    weights = dict(network.named_parameters())
    params = list(weights.values())
    average = {name: p.detach().clone() for name, p in weights.items()} if args.ema else {}
    # fused: the default on a GPU takes another 4 bytes a parameter for a moment
    optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type == "cuda")
    for p in params:
        optimizer.state[p] = {"step": torch.tensor(0.0, device=device)} | {m: torch.zeros_like(p) for m in MOMENTS}
    state = training_state(weights, average, optimizer)

    state_file, log_file = args.out / "state" / "state.safetensors", args.out / "log.jsonl"
    start, seconds = 0, 0
    if rank == 0 and state_file.exists():
        start = load_state(state_file, state)
    if rank == 0:
        millions = sum(p.numel() for p in params) / 1e6
        resuming = f", resuming at step {start}" if start < args.steps else f", already at step {start}"
        resuming = resuming if start else ""
        print(f"{args.teacher} -> {args.out} on {world} x {device} in {precision}: "
              f"{millions:.1f} M parameters, {len(prompts)} prompts, guidance {args.guidance}, "
              f"input time {args.input_time}, {args.steps} steps of {args.batch}, {micro} at once{resuming}",
              flush=True)
    if args.dry_run:
        return
    if world > 1:                                           # only the first process need see the checkpoint
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # the others wait while the first one saves and paints
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
        start = torch.tensor(start, device=device)
        for tensor in [start, *state.values()]:
            dist.broadcast(tensor, 0)
        start = start.item()
    for p in params:
        optimizer.state[p]["step"].fill_(start)

    def autocast():
        # no cache of cast weights: it would keep those of the passes without gradient for the pass with one
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)

    def losses(step, indices):
        """Backpropagate these samples' share of the step's loss.

        Returns what to log: sums and counts by time, and boundary.
        """
        eps, t, prompt, w = draw(args.seed, step, indices, teacher.shape, schedule.T, len(prompts),
                                 args.guidance)
        eps, t, w = eps.to(device), t.to(device), w.to(device)
        cond = teacher.encode([prompts[k] for k in prompt])                 # (B, 77, D)
        end = [n for n, i in enumerate(indices) if i % BOUNDARY_EVERY == 0]

        def on(part):
            """Student and teacher as functions of noise and time, for these samples' prompts and guidance."""
            c, v = cond[part], 1.0 if args.guidance == 1 else w[part]
            return (lambda eps, t: student(eps, t, c, v),
                    lambda x_t, t: teacher.denoise(x_t, t, c, v, student.uncond))

        s, boundary = (t - delta).clamp(min=0), eps.new_zeros(())
        weight = (1 - contraction(t, s, schedule)).float() ** args.weight
        with autocast():
            bootstrap = bootstrap_loss(*on(slice(None)), eps, t, s, schedule, args.solver, weight)  # (B,)
        (scale / args.batch * bootstrap.sum()).backward()   # each on its own: one graph in memory at a time
        if end and args.boundary_weight:
            with autocast():
                boundary = boundary_loss(*on(end), eps[end], schedule).sum() / len(range(0, args.batch, BOUNDARY_EVERY))
            (scale * args.boundary_weight * boundary).backward()
        by_time = torch.zeros(2, BINS, device=device).index_add_(
            1, (t - 1) * BINS // schedule.T, torch.stack([bootstrap.detach(), torch.ones_like(bootstrap)]))
        return torch.cat([by_time.flatten(), boundary.detach().view(1)])

    def save(step):
        """The student first: a crash in between repeats some steps and writes it again."""
        save_student(args.out / "student", student, average or weights)
        save_state(state_file, state, step)

    if rank == 0:                                           # for the pictures: fixed prompts and noises
        shown = [prompts[k * len(prompts) // 8] for k in range(8)]
        eps_shown, cond_shown = noise(range(8), teacher.shape).to(device), teacher.encode(shown)
        w_shown = student.pick_guidance()

    def row(sampler):
        """The pictures of a callable (eps, cond) -> samples, as many at once as training holds."""
        with torch.no_grad(), autocast():
            parts = zip(eps_shown.split(micro), cond_shown.split(micro))
            return [image for part in parts for image in to_pil(teacher.decode(sampler(*part)))]

    if rank == 0 and args.sample_every and start < args.steps:
        teacher_row = row(lambda eps, cond: student.solve(eps, cond, schedule.grid(50), w_shown))

    def picture(step):
        """samples/step_N.png: the teacher's 50 steps above the averaged student's one."""
        trained = {name: weights[name].data for name in average}
        for name, a in average.items():
            weights[name].data = a
        student_row = row(lambda eps, cond: student(eps, 0, cond, w_shown))
        for name, p in trained.items():
            weights[name].data = p
        whole = sheet([teacher_row, student_row], 96)
        write_file(args.out / "samples" / f"step_{step}.png", lambda p: whole.save(p, "PNG"))

    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):          # from here on: save at the next step, exit 0
        signal.signal(number, lambda *_: stop.append(True))
    if rank == 0:
        write_json(args.out / "config.json", config)
        seconds = rewind_log(log_file, start)
    done, began = start, time.time() - seconds
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=rank > 0, mininterval=1)
    for step in bar:
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        optimizer.zero_grad()
        mine = range(rank * share, (rank + 1) * share)
        log = sum(losses(step, mine[k:k + micro]) for k in range(0, share, micro))
        log = torch.cat([log, log.new_tensor([float(bool(stop))])])
        if world > 1:                                   # every process, every step: no collective in a branch
            for tensor in [log, *(p.grad for p in params)]:
                dist.all_reduce(tensor)
        if scale > 1:
            for p in params:
                p.grad.div_(scale)
        sums, counts, boundary, stopping = log[:BINS], log[BINS:2 * BINS], log[-2].item(), log[-1].item() > 0
        bootstrap, norm = sums.sum().item() / args.batch, torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        if not math.isfinite(bootstrap + boundary + norm):
            _, t, _, w = draw(args.seed, step, range(min(args.batch, 16)), teacher.shape, schedule.T,
                              len(prompts), args.guidance)
            raise BadInput(f"the loss is not finite at step {step} (first times {t.tolist()}, "
                           f"guidance {[round(v, 2) for v in w.tolist()]}); what {args.out} holds is whole: "
                           "lower --lr, or take --precision bf16 or fp32, in another --out")
        optimizer.step()
        with torch.no_grad():
            decay = min(args.ema, (step + 1) / (step + 10))
            for name, a in average.items():
                a.lerp_(weights[name], 1 - decay)

        done = step + 1
        if rank == 0 and (done % 10 == 0 or done == args.steps):
            bar.set_postfix(bootstrap=f"{bootstrap:.4f}", boundary=f"{boundary:.4f}")
            by_time = [total / n if n else None for total, n in zip(sums.tolist(), counts.tolist())]
            line = {"step": done, "bootstrap": bootstrap, "boundary": boundary, "lr": lr, "grad_norm": norm,
                    "seconds": round(time.time() - began, 1), "bootstrap_by_time": by_time}
            with open(log_file, "a") as file:
                file.write(json.dumps(line) + "\n")
        if rank == 0 and (done % args.save_every == 0 or done == args.steps or stopping):
            save(done)
        if rank == 0 and args.sample_every and (done % args.sample_every == 0 or done == args.steps):
            picture(done)
        if stopping:
            break
    if world > 1:
        dist.destroy_process_group()
    if rank == 0 and done < args.steps:
        print(f"stopped at step {done}; the same command goes on")
    elif rank == 0:
        out = shlex.quote(str(args.out))
        print(f"the student is in {args.out / 'student'}\n"
              f"  python sample.py --student {out}"
              + (f" --{'prompt' if teacher.kind == 'text' else 'label'} {shlex.quote(prompts[0])}" * bool(teacher.kind))
              + (f"\n  python -m tools.evaluate --student {out}" if embedded else ""))


if __name__ == "__main__":
    command(main)
