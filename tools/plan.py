"""What a run of train.py takes, before it is started: parameters, operations, memory, hours.

    python -m tools.plan --teacher sd21                                 on this machine
    python -m tools.plan --teacher sd21 --device cuda                   on a GPU, which need not be here
    python -m tools.plan --teacher sd21 --device cuda --processes 8 --shard --micro-batch 8
    python -m tools.plan --teacher sd21 --device cuda --tflops 60 --price 0.4       # what it costs on a rented GPU

It takes train.py's options. In training, a GPU takes as many samples at once as fit, up to 16. Here --micro-batch says
how many (default: 4; for an embedded teacher a process's whole share).

How it counts: train.py's loop runs here as it is, one step of each kind, but on fake tensors. They have a shape and a
dtype and no values. PyTorch takes them through the operations of real ones, which are counted, and so are the bytes of
the tensors that are in use at the same time.
"""

import argparse
import contextlib
import math
import warnings
import weakref
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import train
from plumbing.checkpoints import FILE_SIZE
from plumbing.configs import Number, check
from plumbing.files import BadInput, command, new_parser, parsing
from plumbing.processes import PRECISION
from plumbing.prompts import FEW, encode_by_number
from plumbing.run import most_bytes, split_batch

PYTHON = 440e6          # bytes of a process on a CPU with its libraries, their threads and code: found by trial
TFLOPS = {"cpu": 0.1, "cuda": 100.0}            # of two CPU cores in fp32; of an H200 in bf16, four samples at once


aten = torch.ops.aten
FORMULAS = flop_registry | {                    # torch's own, and those of a CPU's attention, which it lacks
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward]}


class Meter(TorchDispatchMode):
    """While it is on, it counts: .flops of the operations; .bytes of the tensors that were made and are still in use,
    and the most that it was, .peak."""

    def __init__(self):
        super().__init__()
        self.made, self.bytes, self.peak, self.flops = {}, 0, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        formula = FORMULAS.get(operation._overloadpacket)
        if formula:
            self.flops += formula(*args, **kwargs, out_val=result)
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in given and storage._cdata not in self.made:
                self.made[storage._cdata] = weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
        return result

    def free(self, key, size):
        del self.made[key]
        self.bytes -= size


def storages(tree):
    """Those of all tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Plan:
    """What train.train gets here for its run. It has the methods of plumbing.run.Run that the loop calls.

        plan = Plan(args, world=8)
        train.train(args, plan)
        plan.kinds                              # [(number of steps, {loss: FLOPs of a sample}), ...]
        plan.memory()                           # {part: bytes of a process}"""

    def __init__(self, args, world=1):
        if args.shard and world == 1:
            raise BadInput("--shard splits the networks over several processes: give --processes")
        self.args, self.world = args, world
        self.on_cpu = args.device == "cpu" or not (args.device or torch.cuda.is_available())
        args.precision = args.precision or ("fp32" if self.on_cpu else "bf16")
        self.dtype, self.device = PRECISION[args.precision], torch.device("meta")       # where loading reads no values
        self.local_batch, self.micro_batch = split_batch(args, world, torch.device("cpu"))
        self.mode, self.meter = FakeTensorMode(allow_non_fake_inputs=True), Meter()
        self.samples = range(self.local_batch)
        self.networks, self.state, self.trained, self.kinds, self.disk, self.peaks = {}, {}, [], [], {}, {}

    # ------------------------------------------------------------------------------------------ before the loop
    def begin(self, teacher, prompts):
        self.teacher, self.prompts = teacher, prompts

    def add(self, name, network, lr=None, betas=None, saved=True):
        network.checkpointing = self.args.grad_checkpointing
        self.networks[name] = self.fake(network)
        if saved:
            self.disk[f"{name}."] = nbytes(network.own_parameters().values())
        if lr is None:
            return None
        learned = [p for p in network.parameters() if p.requires_grad]
        self.trained += learned
        self.disk |= {f"{name}.{kind}.": nbytes(learned) for kind in ("exp_avg", "exp_avg_sq")}
        return SimpleNamespace(param_groups=[{}])           # stands for its Adam

    def fake(self, network):
        """Give a network on the meta device fake parameters on the CPU."""
        network.to = lambda device: network                 # plumbing.weights.visiting moves nothing here
        with self.mode:
            return network.to_empty(device="cpu")

    def restore(self):
        return 0

    def ready(self, *_):
        teacher, self.whole = self.teacher, {}
        for name, network in (("VAE", teacher.vae), ("text encoder", teacher.text_encoder)):
            if network:
                self.whole[name] = self.fake(network)
        teacher.device = torch.device("cpu")
        teacher.set_negative_prompt(teacher.negative_prompt)
        self.conditions, self.few = encode_by_number(teacher, self.prompts), len(self.prompts) <= FEW
        self.resting = set()
        if not self.on_cpu:                                 # what Run.begin moves to the CPU's memory
            resting = {"VAE", "text encoder"} if self.args.grad_checkpointing or self.few else {"VAE"}
            self.resting = self.whole.keys() & resting

    # ------------------------------------------------------------------------------------------------- the loop
    def steps(self):
        """The first step of each kind, and a sheet of samples."""
        for steps in kinds_of_steps(self.args):
            if steps:
                self.kinds.append((len(steps), {}))
                yield steps[0]
        if self.args.samples and self.teacher.vae:
            num = min(self.args.samples, self.micro_batch, self.teacher.decoded_at_once)
            with torch.no_grad(), self.autocast(), self.phase("decoding", "VAE"):
                self.teacher.vae.decode(self.to_device(torch.empty(num, *self.teacher.shape)))

    def zero_grad(self):
        for p in self.trained:
            p.grad = None

    def encode(self, numbers):
        with self.phase("encoding", None if self.few else "text encoder"):
            condition = self.conditions(numbers)
        self.log(text=None)
        return condition

    def micro_batches(self, drawn, condition):
        """So few samples that their share of boundary losses is that of the batch. Of several micro-batches all but the
        first find the gradients of those before, and need more memory."""
        if self.local_batch > self.micro_batch:
            with self.meter:
                for p in self.trained:
                    p.grad = torch.zeros_like(p)
        _, flops = self.kinds[-1]
        flops["text"] /= self.local_batch
        num = min(self.local_batch, math.lcm(self.micro_batch, train.BOUNDARY_EVERY))
        for first in range(0, num, self.micro_batch):
            rows = slice(first, first + self.micro_batch)
            yield (self.samples[rows], [self.to_device(tensor[rows]) for tensor in drawn],
                   {name: self.to_device(tensor[rows]) for name, tensor in condition.items()})
        for name in flops.keys() - {"text"}:
            flops[name] /= num

    def memory_permitting(self):
        return self.phase("passes")

    @contextlib.contextmanager
    def phase(self, name, visitor=None):
        """Count what is computed in it. `visitor`: a part of the teacher that is on the device only during this phase,
        if it rests."""
        weights = nbytes(self.whole[visitor].parameters()) if visitor in self.resting else 0
        self.meter.bytes += weights
        self.meter.peak = self.meter.bytes
        with self.meter:
            yield
        self.meter.bytes -= weights
        self.peaks[name] = max(self.peaks.get(name, 0), self.meter.peak)

    def to_device(self, tensor):
        return self.mode.from_tensor(tensor)

    def autocast(self):
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def backward(self, loss):
        loss.backward()

    def log(self, **losses):
        """Count what was computed since the last call as operations of the first of these losses."""
        name, (_, flops) = next(iter(losses)), self.kinds[-1]
        flops[name] = flops.get(name, 0) + self.meter.flops
        self.meter.flops = 0

    def ignore(self, *_, **__):
        """What a plan has no use for."""

    remember = log_by_time = update = average = after = ignore

    # ------------------------------------------------------------------------------------------------ the result
    def memory(self):
        """{part: bytes of a process}. Of its phases (passes, encoding of prompts, decoding of samples) the largest
        counts. With --shard it has its share of the loop's networks, Adam and gradients. It also gathers two blocks at
        a time: their weights, and their gradients in float32."""
        shards = self.world if self.args.shard else 1
        gradients = nbytes(self.trained)
        memory = {name: nbytes(network.own_parameters().values()) / shards for name, network in self.networks.items()}
        memory |= {name: nbytes(part.parameters()) for name, part in self.whole.items() if name not in self.resting}
        memory |= {"Adam": 2 * gradients / shards, "gradients": gradients / shards}
        largest = max(self.peaks, key=self.peaks.get)
        memory[largest] = max(0, self.peaks[largest] - gradients)
        if self.args.shard:
            blocks = [block for network in self.networks.values() for block in network.blocks()]
            most = max(sum(p.numel() for p in block.parameters()) for block in blocks)
            memory["gathered"] = 2 * most * (self.dtype.itemsize + 4)
        if self.on_cpu:
            memory |= {"saving": min(FILE_SIZE, self.checkpoint() / self.world), "Python": PYTHON}
        if self.on_cpu and self.few:
            memory["prompts"] = nbytes(self.conditions([*range(len(self.prompts))]).values())
        return memory

    def checkpoint(self):
        """Bytes of the largest checkpoint."""
        return most_bytes(self.disk)


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def kinds_of_steps(args):
    """The numbers of the steps of each kind: BOOT's alone, with the critic's head start, matched, matched with BOOT,
    refined."""
    with warnings.catch_warnings(action="ignore"):          # train.train has warned already
        critic_from, match_from, refine_from = (min(step, args.steps) for step in train.phases(args, 0, 0))
    matched = range(match_from, refine_from)
    with_boot = [step for step in matched if (step + 1) % train.BOOT_EVERY == 0]
    return [range(critic_from), range(critic_from, match_from), sorted(set(matched) - set(with_boot)), with_boot,
            range(refine_from, args.steps)]


def report(plan, tflops, price=None):
    """The lines that the command prints. `tflops`: TFLOP/s of a process. `price`: of its device, dollars an hour."""
    args, losses = plan.args, list(dict.fromkeys(name for _, flops in plan.kinds for name in flops))
    yield (f"{args.teacher} in {args.precision}, {args.steps} steps of {args.batch} samples: {plan.world} processes x "
           f"{plan.local_batch // plan.micro_batch} micro-batches x {plan.micro_batch} samples")
    yield "parameters, millions"
    for name, network in (plan.networks | plan.whole).items():
        own = network.own_parameters().values() if name in plan.networks else network.parameters()
        yield f"  {name:14} {sum(p.numel() for p in own) / 1e6:9.1f}"
    yield "GFLOP of a sample, by loss\n  steps     " + "".join(f"{name:>12}" for name in losses)
    for number, flops in plan.kinds:
        yield f"  {number:<10}" + "".join(f"{flops.get(name, 0) / 1e9:12.2f}" for name in losses)
    total = args.batch * sum(number * sum(flops.values()) for number, flops in plan.kinds)
    hours = total / (tflops * 1e12 * plan.world) / 3600
    cost = "" if price is None else f", {hours * plan.world * price:.3g} dollars at {price:g} an hour and process"
    yield (f"PFLOP of the run {total / 1e15:.4g}: {hours:.3g} hours at {tflops:g} TFLOP/s a process, "
           f"{args.steps * args.batch / hours / 3600:.3g} samples/s{cost}")
    yield "memory of a process, GB"
    memory = plan.memory()
    for name, size in (memory | {"together": sum(memory.values())}).items():
        yield f"  {name:14} {size / 1e9:9.3f}"
    yield f"a checkpoint on disk, GB: {plan.checkpoint() / 1e9:.3f}; there are three of them while one is written"


def parse_args():
    """(train.py's arguments, our own)."""
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option = ours.add_argument_group("plan").add_argument
    option("--processes", type=int, default=1, help="of torchrun (default: %(default)s)")
    option("--tflops", type=float, help="that a process sustains (default: 100 on a GPU, as an H200 with 4 samples at "
           "once, and 250 with 16; 0.1 on a CPU, as two cores)")
    option("--price", type=float, help="of a process's device, in dollars an hour")
    both = new_parser(__doc__, parents=[ours])
    train.add_options(both)
    both.parse_args()                                       # for --help, and for what neither knows
    own, rest = ours.parse_known_args()
    with parsing("tools.plan"):
        check("--processes", own.processes, [Number(int, 1, 10**6)])
        check("--tflops", own.tflops, [None, Number(float, 1e-6, 1e6)])
        check("--price", own.price, [None, Number(float, 0, 1e6)])
    return train.parse_args(rest), own


def main():
    args, own = parse_args()
    plan = Plan(args, own.processes)
    train.train(args, plan)
    print(*report(plan, own.tflops or TFLOPS["cpu" if plan.on_cpu else "cuda"], own.price), sep="\n")


if __name__ == "__main__":
    command(main)
