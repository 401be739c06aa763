"""A run of train.py: everything in it that is not the method.

    with Run(args) as run:                                  # processes, device, precision
        run.begin(teacher, prompts)                         # the folder's lock and last checkpoint, the other processes
        adam = run.add("student", student.network, lr, betas)       # sharded if asked, and part of the checkpoint
        start = run.restore()
        run.ready(ema, write_student, "summary")
        for step in run.steps():
            run.zero_grad()
            for samples, [eps], condition in run.micro_batches([eps], run.encode(numbers)):
                with run.memory_permitting():
                    run.backward(loss)
                    run.log(bootstrap=loss)
            run.update(adam)
            run.after(step)                                 # finite? log, checkpoint, samples

One process or many: every method is called by all of them, and does what its process has to do.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shlex
import sys
import time
import warnings

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.checkpoints import (check_folder, check_options, check_space, load, lock, newest, rewind_log,
                                  save, whole_tensors)
from plumbing.files import BadInput, out_of_memory, write_json
from plumbing.hub import ROOT, is_embedded
from plumbing.images import image_grid, noise, save_png, to_pil
from plumbing.processes import (MEETING, PRECISION, WAIT, Stop, full, join, local, peak_memory, pick_device,
                                shard, together, torchrun, warn_if_busy)
from plumbing.prompts import FEW, encode_by_number

LOG_EVERY = 10              # steps; only then does the host wait for the device
BINS = 8                    # the log has the bootstrap loss of each eighth of the times 1..T
MAX_NORM = 1.0              # to which a network's gradient is clipped


def most_bytes(sizes):
    """Bytes of a run's largest checkpoint, of {name: bytes} of its whole state. Where there is a critic, that is one
    without first moments, see Run.needed_state."""
    with_critic = any(name.startswith("critic.") for name in sizes)
    return sum(size for name, size in sizes.items() if not (with_critic and ".exp_avg." in name))


def split_batch(args, world, device):
    """(local batch, micro-batch): how many of a step's samples are one process's, and how many it holds at once."""
    if args.batch % world:
        more = -(-args.batch // world) * world
        raise BadInput(f"--batch {args.batch} does not divide over {world} processes: {more} does")
    local_batch = args.batch // world
    most = 16 if device.type == "cuda" else 4               # on a GPU halved, if its memory does not suffice
    micro_batch = args.micro_batch or (local_batch if is_embedded(args.teacher) else math.gcd(local_batch, most))
    if local_batch % micro_batch:
        raise BadInput(f"--micro-batch {micro_batch} does not divide {local_batch}, each process's share of --batch")
    return local_batch, micro_batch


class Run(contextlib.ExitStack):
    """See the top of this file. As an ExitStack it gives up the folder's lock in the end, however that comes.
    .device, .dtype: of the passes. .samples: the range of this process's samples in each step's batch.
    .interrupted: whether Ctrl-C has ended the run."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.rank, self.world, local_rank = torchrun()
        if self.rank == 0:
            check_folder(args.out)                          # now, and not after a download
        self.device = pick_device(args.device, local_rank)
        self.local_batch, self.micro_batch = split_batch(args, self.world, self.device)
        self.samples = range(self.rank * self.local_batch, (self.rank + 1) * self.local_batch)
        args.precision = args.precision or ("bf16" if self.device.type == "cuda" else "fp32")
        self.dtype = PRECISION[args.precision]
        self.state, self.networks, self.adams, self.saving, self.interrupted = {}, {}, {}, None, False
        warnings.showwarning = warn_once if self.rank == 0 else lambda *_: None
        warnings.filterwarnings("ignore", "torch.distributed is disabled")      # one process saves without it
        if args.shard and self.world == 1:
            raise BadInput("--shard splits the networks over several processes: start it with torchrun")
        # In fp16 small gradients would be zero; the scaler's two tensors are part of the checkpoint.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")
        if self.scaler.is_enabled():
            self.scaler._lazy_init_scale_growth_tracker(self.device)
            self.state |= {"scaler.scale": self.scaler._scale, "scaler.good_steps": self.scaler._growth_tracker}

    # ------------------------------------------------------------------------------------------ before the loop
    def begin(self, teacher, prompts):
        """Lock the run's folder, find its last checkpoint, and meet the other processes. Raises BadInput if the folder
        holds another run or is in use, or if the processes differ in options or teacher."""
        args, self.teacher, self.prompts = self.args, teacher, prompts
        self.options = {name: value for name, value in vars(args).items() if name not in ("dry_run", "out")}
        self.options |= {"teacher": teacher.spec, "fingerprint": teacher.fingerprint,
                         "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]}
        found = [0, None, self.options]
        if self.rank == 0:
            if not args.dry_run:
                self.enter_context(lock(args.out))
            start, folder, saved = newest(args.out)
            check_options(args.out, self.options, saved)
            found = [start, folder, self.options]
        if self.world > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            join(self.rank, self.world, "nccl" if self.device.type == "cuda" else "gloo")
            self.control = dist.new_group(backend="gloo", timeout=WAIT)     # for what the host has to know
            self.saving = dist.new_group(backend="gloo", timeout=MEETING)   # which waits for the slowest disk
            with together(self.rank):
                dist.broadcast_object_list(found, 0, device=self.device)
        self.start, self.folder, theirs = found
        if theirs != self.options:
            raise BadInput(f"process {self.rank} has other options or another teacher than the first: {self.options}")
        self.encode = encode_by_number(teacher, prompts)
        teacher.rest(text_encoder=args.grad_checkpointing or len(prompts) <= FEW)

    def add(self, name, network, lr=None, betas=None, saved=True):
        """Make a network part of the run: sharded and checkpointed as the options say, and saved. With a rate it is
        trained: returns its AdamW, whose state exists from the start, so that resuming has tensors to fill."""
        network.checkpointing = self.args.grad_checkpointing
        if self.args.shard:
            shard(network, self.device, self.dtype)
        self.networks[name] = network
        if saved:
            self.state |= {f"{name}.{key}": p.detach() for key, p in network.own_parameters().items()}
        if lr is None:
            return None
        learned = {key: p for key, p in network.named_parameters() if p.requires_grad}
        # fused, because the default is slower and needs temporaries, on a GPU of another 4 bytes a parameter
        adam = torch.optim.AdamW(learned.values(), lr, betas, weight_decay=0.0,
                                 fused=self.device.type in ("cpu", "cuda"))
        for key, p in learned.items():
            adam.state[p] = {"step": torch.tensor(0.0, device=self.device),
                             "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state |= {f"{name}.{kind}.{key}": tensor for kind, tensor in adam.state[p].items()}
        self.adams[name] = adam
        return adam

    def restore(self):
        """Read the last checkpoint into what was added. Returns the step from which the run goes on, 0 if anew."""
        if self.folder:
            load(self.folder, self.state)
        if self.world > 1:
            with together(self.rank):                       # some read from a slower disk, or not from a cache
                dist.monitored_barrier(self.control, timeout=MEETING)
        return self.start

    def ready(self, ema, write_student, summary):
        """Say what begins, and check that its checkpoints have room.
        `ema`: the Student that is saved and makes samples. `write_student`: callable (tensors)."""
        args, self.ema, self.write_student = self.args, ema, write_student
        if self.rank > 0:
            return
        resuming = f"; resuming at step {self.start}" if self.start else ""
        print(f"{args.teacher} -> {args.out} on {self.world} x {self.device} in {args.precision}: {args.steps} steps "
              f"of {args.batch}, {self.micro_batch} at once, {len(self.prompts)} prompts, {summary}{resuming}",
              flush=True)
        check_space(args.out, most_bytes({name: tensor.nbytes for name, tensor in self.state.items()}))
        warn_if_busy(self.device)

    # ------------------------------------------------------------------------------------------------- the loop
    def steps(self):
        """The numbers of the steps that are still to be made, with a bar. The loop ends early after a signal."""
        args = self.args
        if args.dry_run:
            return
        self.stop, self.done = Stop(speaks=self.rank == 0), self.start
        tensors = whole_tensors(self.ema.network, self.rank)
        if self.rank == 0:
            write_json(args.out / "config.json", self.options)              # for people
            began = time.time() - rewind_log(args.out / "log.jsonl", self.start)
            self.clock = {"run": began, "log": time.time(), "step": self.start}
            if self.start:                                  # a crash may have come between the state and its student
                self.write_student(tensors)
        self.unchecked, self.teacher_row = [], None
        with tqdm(range(self.start, args.steps), initial=self.start, total=args.steps, disable=self.rank > 0,
                  mininterval=1 if sys.stderr.isatty() else 60) as self.bar:
            for step in self.bar:
                yield step
                if self.stopping:
                    break
        self.finish()

    def zero_grad(self):
        """Forget the gradients and the logged values of the step before."""
        for adam in self.adams.values():
            adam.zero_grad()
        self.logged, self.drawn = {}, {}

    def micro_batches(self, drawn, condition):
        """This process's samples of a step, a micro-batch at a time: their range in the whole batch, and their rows of
        the tensors drawn and of the condition, on the run's device. If a micro-batch does not fit into memory, and its
        size was not given, all processes begin the step again with fewer samples at once."""
        first = 0
        while first < self.local_batch:
            rows = slice(first, first + self.micro_batch)
            yield (self.samples[rows], [self.to_device(tensor[rows]) for tensor in drawn],
                   {name: self.to_device(tensor[rows]) for name, tensor in condition.items()})
            first = rows.stop
            if not self.args.micro_batch and self.anywhere(self.ran_out):
                self.micro_batch = max(n for n in range(1, self.micro_batch // 2 + 1) if self.local_batch % n == 0)
                first = 0
                self.zero_grad()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                warnings.warn(f"memory ran out: from here on {self.micro_batch} samples at once", stacklevel=2)

    @contextlib.contextmanager
    def memory_permitting(self):
        """Around the passes of a micro-batch: gives up if memory runs out, so that micro_batches can try with fewer.
        Where networks are sharded it does not, because the other processes would wait for this one in their passes."""
        self.ran_out = False
        try:
            yield
        except RuntimeError as error:
            fixed = self.args.micro_batch or self.args.shard
            if fixed or self.micro_batch == 1 or not out_of_memory(error):
                raise
            self.ran_out = True

    def anywhere(self, flag):
        """Whether a flag is set in any process. All of them have to ask."""
        flag = torch.tensor(float(flag))
        if self.world > 1:
            with together(self.rank):
                dist.all_reduce(flag, group=self.control)
        return flag.item() > 0

    def to_device(self, tensor):
        """The tensor on the run's device, without waiting for what the device still has to do."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def autocast(self):
        """Mixed precision. Cast weights are not cached: a cast made under no_grad would be used again, without a
        gradient."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def backward(self, loss):
        """Add a loss's gradient to those of the weights. Sharded gradients are summed over the processes at once."""
        self.scaler.scale(loss).backward()

    def log(self, **values):
        """Add to the step's logged values, by name. They are summed over micro-batches and processes."""
        for name, value in values.items():
            self.logged[name] = self.logged.get(name, 0) + value.detach()

    def log_by_time(self, losses, t):
        """Log the losses (B,) of samples at times t (B,), for each eighth of 1..T."""
        bins, sums = (t - 1) * BINS // self.teacher.schedule.T, torch.zeros(2, BINS, device=losses.device)
        self.log(by_time=sums.index_add_(1, bins, torch.stack([losses.detach(), torch.ones_like(losses)])))

    def remember(self, **drawn):
        """What was drawn for the step, (B,) each. It is named if a loss turns out not to be finite."""
        self.drawn = self.drawn or {name: values[:16] for name, values in drawn.items()}

    def update(self, *adams):
        """One step of each optimizer: gradients are summed over the processes, clipped, and given to Adam."""
        if self.world > 1:
            grads = [p.grad for adam in adams for p in adam.param_groups[0]["params"] if not self.args.shard]
            with together(self.rank):
                for tensor in (*self.logged.values(), *grads):
                    dist.all_reduce(tensor)
        self.norms = {}
        for name, adam in self.adams.items():
            if adam in adams:
                self.scaler.unscale_(adam)
                norm = full(torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], MAX_NORM))
                self.norms["grad_norm" if name == "student" else f"{name}_grad_norm"] = norm
                self.scaler.step(adam)                      # but not where fp16 has overflowed
        self.scaler.update()

    @torch.no_grad()
    def average(self, ema, student, decay):
        """Move a network's weights to another's, of the same kind: ema = decay * ema + (1 - decay) * student."""
        ours, theirs = ([local(p) for p in network.own_parameters().values()] for network in (ema, student))
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def after(self, step):
        """After a step: check that it was finite, log it, save and make samples, each where it is due. The host waits
        for the device only then, and in the first step."""
        args, self.done = self.args, step + 1
        self.stopping, last = self.anywhere(self.stop.asked), self.done == args.steps
        by_time = self.logged.pop("by_time", None)
        self.unchecked.append((step, self.logged, self.norms, self.drawn))
        logging, due = self.done % LOG_EVERY == 0 or last, self.done % args.every == 0 or last
        if logging or due or self.stopping or step == self.start:
            self.check_finite()
        if logging and self.rank == 0:
            self.write_log(by_time)
        if due or self.stopping:
            with together(self.rank):
                save(args.out, self.done, self.needed_state(), self.ema.network, self.options, self.write_student,
                     self.rank, self.world, self.saving)
        if args.samples and due:
            self.write_samples()

    def needed_state(self):
        """What a checkpoint has to hold. Where beta_1 is 0, Adam's first moment is the last gradient, which the next
        step replaces. A critic that has not learned yet is as it began."""
        spared = [f"{name}.exp_avg." for name, adam in self.adams.items() if adam.param_groups[0]["betas"][0] == 0]
        spared += ["critic."] * (not self.state.get("critic_steps", True))
        return {name: tensor for name, tensor in self.state.items() if not name.startswith(tuple(spared))}

    def check_finite(self):
        """Raise BadInput if a step since the last check had a loss or a norm that is not finite."""
        for step, losses, norms, drawn in self.unchecked:
            overflows = self.scaler.is_enabled() and self.scaler.get_scale() >= 1       # which only lowers the scale
            values = losses if overflows else losses | norms
            if broken := [name for name, value in values.items() if not value.isfinite()]:
                advice = (f"what {self.args.out} holds is whole: lower --lr or --critic-lr, or take --precision bf16 "
                          "or fp32, in another --out")
                if step == 0:
                    advice = "no weight has changed yet, so the teacher, its schedule or --precision fp16 is at fault"
                about = "; ".join(f"{name} {[round(v, 2) for v in values.tolist()]}, ..."
                                  for name, values in drawn.items())
                raise BadInput(f"{' and '.join(broken)} not finite at step {step} ({about}); {advice}")
        self.unchecked.clear()

    def write_log(self, by_time):
        """Append a line to log.jsonl. `by_time`: (2, BINS), sums of the bootstrap loss and numbers of samples."""
        values = self.logged | self.norms
        figures = {name: value.item() if value.isfinite() else None for name, value in values.items()}
        self.bar.set_postfix({name: f"{figures[name]:.4f}" for name in self.logged}, refresh=False)
        seconds = (time.time() - self.clock["log"]) / (self.done - self.clock["step"])
        self.clock |= {"log": time.time(), "step": self.done}
        line = {"step": self.done, **figures, "lr": self.adams["student"].param_groups[0]["lr"],
                "seconds": round(time.time() - self.clock["run"], 1), "seconds_a_step": round(seconds, 4),
                "samples_per_s": round(self.args.batch / seconds, 2),
                "memory_gb": round(peak_memory(self.device) / 1e9, 3)}
        if by_time is not None:
            line["bootstrap_by_time"] = [total / n if n else None for total, n in by_time.T.tolist()]
        with open(self.args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    # -------------------------------------------------------------------------------------------------- samples
    def write_samples(self):
        """samples/step_N.png: the teacher's samples, in 50 steps, above the student's. Noises and prompts are the same
        all along. Every process makes samples; otherwise the others would wait for rank 0."""
        teacher, w = self.teacher, self.ema.pick_guidance()
        grid = teacher.schedule.grid(min(50, teacher.schedule.T))
        try:
            self.teacher_row = self.teacher_row or self.make_samples(functools.partial(teacher.solve, grid=grid, w=w))
            rows = [self.teacher_row, self.make_samples(functools.partial(self.ema, t=0, w=w))]
            if self.rank == 0:
                save_png(self.args.out / "samples" / f"step_{self.done}.png", image_grid(rows, 96), {})
        except BadInput as error:                           # such as an image that is not finite
            warnings.warn(f"no samples: {error}", stacklevel=2)         # which is no reason to end a run

    @torch.no_grad()
    def make_samples(self, sampler):
        """PIL images of a sampler, callable (eps, **condition) -> latents. Raises BadInput if one is not finite."""
        num, images = self.args.samples, []
        eps = noise(range(num), self.teacher.shape).to(self.device)
        condition = self.encode([k * len(self.prompts) // num for k in range(num)])
        for first in range(0, num, self.micro_batch):
            rows = slice(first, first + self.micro_batch)
            with self.autocast():
                latents = sampler(eps[rows], **{name: self.to_device(c[rows]) for name, c in condition.items()})
                images += to_pil(self.teacher.decode(latents, range(first, first + len(latents))))
        return images

    # ---------------------------------------------------------------------------------------------------- the end
    def finish(self):
        """Leave the other processes, and say how it goes on."""
        args, self.interrupted = self.args, self.stop.interrupted
        if self.world > 1:
            dist.destroy_process_group()
        if self.done < args.steps:
            said = f"stopped at step {self.done}; the same command goes on"
        else:
            line = ["python", os.path.relpath(ROOT / "sample.py"), "--student", str(args.out)]
            line += [f"--{self.teacher.condition_type}", self.prompts[0]] * bool(self.teacher.condition_type)
            said = f"the student is in {args.out / 'student'}\n  {shlex.join(line)}"
        if self.rank == 0:
            print(said)


def warn_once(message, *_):
    """Print a warning, and silence those that begin alike: a prompt file may have thousands of prompts to truncate."""
    print(f"warning: {message} (others like it are not shown)", file=sys.stderr)
    warnings.filterwarnings("ignore", re.escape(str(message)[:20]))
