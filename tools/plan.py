"""What a step of train.py takes, before it is taken: floating-point operations, and memory of passes.

    plan = Plan(student, critic, args, autocast)
    flops = plan.flops(boundary)                            # {part of a step: FLOPs of a sample}
    size = plan.activations(samples, boundary, accumulates) # bytes

The passes compute nothing. Fake tensors have a shape, a dtype and a device, but no values; torch takes them through the
operations of the real ones, which are counted, and so are the bytes of what is in use at the same time.
"""

import contextlib
import copy
import functools
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from matching import critic_loss, limited_guidance, matching_loss
from model import UNet
from signal_ode import boot_losses
from student import Critic, Student

# A CPU's attention, which torch's counter does not know; of shapes
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}

PYTHON = 440e6          # bytes of a process on a CPU, with the libraries, their threads and code: found by trial

class Ledger(TorchDispatchMode):
    """.bytes of the tensors that were made while it is on and are still in use, and the most that it was, .peak."""

    def __init__(self):
        super().__init__()
        self.made, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in given and storage._cdata not in self.made:
                self.made[storage._cdata] = weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
        return result

    def free(self, key, nbytes):
        del self.made[key]
        self.bytes -= nbytes

def storages(tree):
    """Those of all tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

def fake(network):
    """A network like this one, of fake tensors."""
    twin = type(network)(network.config)
    for p, real in zip(twin.parameters(), network.parameters()):
        p.data = p.data.to(real.dtype)
        p.requires_grad_(real.requires_grad)
    if isinstance(network, UNet):
        twin.checkpointing = network.checkpointing
    return twin

class Plan:
    """The passes of train.py's steps. student, critic (or None), args: its own. autocast: makes a context."""

    def __init__(self, student, critic, args, autocast):
        self.args, self.autocast = args, autocast
        teacher = copy.copy(student.teacher)
        teacher.schedule = copy.deepcopy(teacher.schedule)                  # its tables are to stay real ones
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode, torch.device(teacher.device):
            teacher.unet, teacher.vae, teacher.text_encoder = (
                network and fake(network) for network in (teacher.unet, teacher.vae, teacher.text_encoder))
            self.student = Student(fake(student.network), teacher, student.input_time, student.guidance)
            self.critic = critic and Critic(fake(critic.network), self.student)
        self.trained = [p for part in (self.student, self.critic) if part for p in part.network.parameters()
                        if p.requires_grad]

    def flops(self, boundary):
        """{part: FLOPs of a sample}. boundary: the slice of the samples with such a loss, every k-th or none."""
        flops, samples = {}, boundary.step or 1
        self.take_step(samples, boundary, functools.partial(counted, flops))
        return {part: count / samples for part, count in flops.items()}

    def activations(self, samples, boundary, accumulates):
        """Bytes that are in use at most beside weights and gradients, in a micro-batch with all losses of the run, and
        while pictures are decoded. accumulates: it is not the first of its step."""
        for p in self.trained:
            p.grad = None
        gradients = sum(p.nbytes for p in self.trained)
        with self.mode, Ledger() as ledger:
            if accumulates:
                for p in self.trained:
                    p.grad = torch.zeros_like(p)
            self.take_step(samples, boundary, contextlib.nullcontext)
        return ledger.peak - gradients

    def most_at_once(self, spare, choices, *rest):
        """The first of the choices, numbers of samples that grow less, whose activations take no more bytes than are
        spare; or the last. rest: as above."""
        return next((n for n in choices[:-1] if self.activations(n, *rest) <= spare), choices[-1])

    def take_step(self, samples, boundary, part):
        """A micro-batch's passes, forward and backward. part: a context made of a part's name."""
        student, critic, autocast, solver = self.student, self.critic, self.autocast, self.args.solver
        teacher, schedule = student.teacher, student.teacher.schedule
        limited = functools.partial(limited_guidance, teacher.denoise, share=1.0, until=schedule.T)
        with self.mode, torch.device(teacher.device):
            with part("text"):
                condition = teacher.encode([*teacher.labels, ""][:1] * samples)
            eps, n = torch.randn(2, samples, *teacher.shape)
            t = torch.full((samples,), schedule.T)
            if self.args.guidance != 1:
                condition["w"] = torch.ones(samples)
            with part("BOOT"):
                with autocast():
                    losses = boot_losses(student, teacher.denoise, eps, t, t // 2, schedule, boundary, solver,
                                         **condition)
                torch.cat(losses).sum().backward()
            del losses
            if critic:
                with part("matching"):
                    with autocast():
                        x = student(eps, 0, **condition)
                        L_M, h = matching_loss(x, limited, critic, n, t, schedule, teacher.clip, **condition)
                    L_M.sum().backward()
                with part("critic"):
                    with autocast():
                        L_C = critic_loss(x.detach(), h, t, schedule)
                    L_C.sum().backward()
                del x, h, L_M, L_C
                with part("critic alone"):
                    with autocast():
                        with torch.no_grad():
                            x = student(eps, 0, **condition)
                        L_C = critic_loss(x, critic(x, t, **condition), t, schedule)
                    L_C.sum().backward()
                del L_C
            if self.args.sample_every and teacher.vae:
                with torch.no_grad(), autocast():
                    teacher.vae.decode(eps[:teacher.decoded_at_once])

@contextlib.contextmanager
def counted(flops, name):
    """Note the operations of what is done there."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        yield
    flops[name] = counter.get_total_flops()

def report(flops, steps, batch, networks, memory):
    """The lines of --dry-run. flops, steps: {part: FLOPs of a sample, steps of the run that have it}. networks:
    {name: parameters}. memory: {name: bytes}."""
    steps = {part: number for part, number in steps.items() if number}
    total = batch * sum(flops[part] * number for part, number in steps.items())
    lines = ["parameters, millions"]
    lines += [f"  {name:15} {sum(p.numel() for p in parameters) / 1e6:10.1f}" for name, parameters in networks.items()]
    lines += ["GFLOP of a sample, and steps that have them"]
    lines += [f"  {part:15} {flops[part] / 1e9:10.2f} {number:10}" for part, number in steps.items()]
    lines += [f"PFLOP of the run  {total / 1e15:10.3g}", "memory of a process, GB"]
    lines += [f"  {name:15} {size / 1e9:10.3f}" for name, size in memory.items() if size]
    lines += [f"  together        {sum(memory.values()) / 1e9:10.3f}"]
    return "\n".join(lines)
