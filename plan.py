"""What a step of train.py takes, before it is taken: floating-point operations, and memory of passes.

    flops, passes = step_costs(student, critic, args, samples, boundary, autocast)

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
from run import local, spare_memory
from student import Critic, Student

# A CPU's attention, which torch's counter does not know; of shapes
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}

# Beginnings of names in a checkpoint, and whose memory that is, beside the networks'
STATE = {"ema.": "average", "critic_network.": None, "critic_": "critic's Adam", "exp_avg": "Adam"}
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

@contextlib.contextmanager
def counted(flops, name):
    """Note the operations of what is done there."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        yield
    flops[name] = counter.get_total_flops()

def step_costs(student, critic, args, samples, boundary, autocast):
    """({part: FLOPs of a sample}, bytes of gradients and of what the passes make, at most) of a micro-batch that has all
    of train.py's losses, and of decoding pictures. critic: or None. boundary: the slice of the samples that have such a
    loss, every k-th or none. autocast: makes a context."""
    teacher, flops = copy.copy(student.teacher), {}
    teacher.schedule = copy.deepcopy(teacher.schedule)                      # its tables are to stay real ones
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(teacher.device):
        teacher.unet, teacher.vae, teacher.text_encoder = (
            network and fake(network) for network in (teacher.unet, teacher.vae, teacher.text_encoder))
        student = Student(fake(student.network), teacher, student.input_time, student.guidance)
        critic = critic and Critic(fake(critic.network), student)
        take_step(student, critic, args, boundary.step or 1, boundary, autocast, functools.partial(counted, flops))
        for p in (*student.network.parameters(), *(critic.network.parameters() if critic else ())):
            p.grad = None
        with Ledger() as ledger:                            # alone: the counter keeps more alive than training does
            take_step(student, critic, args, samples, boundary, autocast, contextlib.nullcontext)
    return {name: count / (boundary.step or 1) for name, count in flops.items()}, ledger.peak

def take_step(student, critic, args, samples, boundary, autocast, part):
    """All passes of a micro-batch, forward and backward. part: a context made of a part's name."""
    teacher, schedule = student.teacher, student.teacher.schedule
    limited = functools.partial(limited_guidance, teacher.denoise, share=args.match_guidance, until=schedule.T)
    with part("text"):
        condition = teacher.encode([*teacher.labels, ""][:1] * samples)
    eps, n = torch.randn(2, samples, *teacher.shape)
    t = torch.full((samples,), schedule.T)
    if args.guidance != 1:
        condition["w"] = torch.ones(samples)
    with part("BOOT"):
        with autocast():
            losses = boot_losses(student, teacher.denoise, eps, t, t // 2, schedule, boundary, args.solver, **condition)
        torch.cat(losses).sum().backward()
    del losses
    if critic:
        with part("matching"):
            with autocast():
                x = student(eps, 0, **condition)
                L_M = matching_loss(x, limited, critic.denoise, n, t, schedule, **condition)
            L_M.sum().backward()
        with part("critic"):
            with autocast():
                L_C = critic_loss(x.detach(), critic.again, n, t, schedule, **condition)
            L_C.sum().backward()
        del x, L_M, L_C
    if args.sample_every and teacher.vae:
        with torch.no_grad():
            teacher.vae.decode(eps[:teacher.decoded_at_once])

def most_at_once(spare, choices, student, critic, args, boundary, autocast):
    """The first of the choices, numbers of samples that grow less, whose passes take no more bytes than are spare; or
    the last. The rest as above."""
    for samples in choices[:-1]:
        if step_costs(student, critic, args, samples, boundary, autocast)[1] <= spare:
            return samples
    return choices[-1]

def report(student, critic, args, split, boundary, steps, state, prompts, autocast):
    """The lines of --dry-run: parameters, operations, and the memory of a process, part by part.
    split: processes, micro-batches of each, samples of one. steps: {part: how many of the run's have it}. state: the
    tensors of a checkpoint, by name. prompts: the conditions that are encoded once, or {}. The rest: as above."""
    teacher, device, samples = student.teacher, student.teacher.device, split[-1]
    flops, passes = step_costs(student, critic, args, samples, boundary, autocast)
    networks = {"student": student.network, "critic": critic and critic.network, "teacher": teacher.unet,
                "VAE": teacher.vae, "text encoder": teacher.text_encoder}
    networks = {name: network for name, network in networks.items() if network is not None}
    memory = {name: sum(local(p).nbytes for p in network.parameters()) for name, network in networks.items()}
    for name, tensor in state.items():
        if part := next((part for prefix, part in STATE.items() if name.startswith(prefix)), None):
            memory[part] = memory.get(part, 0) + local(tensor).nbytes
    gradients = sum(4 * p.numel() for network in networks.values() for p in network.parameters() if p.requires_grad)
    memory |= {"prompts": sum(value.nbytes for value in prompts.values()), "gradients": gradients,
               "activations": passes - gradients}
    if device.type == "cpu":
        saved = sum(tensor.nbytes for tensor in state.values())
        memory |= {"saving": 2 * saved if spare_memory() > 2 * saved else 0, "Python": PYTHON}
    lines = [f"a step: {args.batch} samples = {split[0]} x {split[1]} x {samples} (processes, micro-batches, at once)",
             "parameters, millions"]
    lines += [f"  {name:15} {sum(p.numel() for p in network.parameters()) / 1e6:10.1f}"
              for name, network in networks.items()]
    lines += ["GFLOP of a sample, and steps that have them"]
    lines += [f"  {part:15} {flops[part] / 1e9:10.2f} {number:10}" for part, number in steps.items()]
    total = sum(flops[part] * args.batch * number for part, number in steps.items())
    lines += [f"  the whole run   {total / 1e9:10.3g}", f"memory of a process, GB of {device}"]
    lines += [f"  {name:15} {size / 1e9:10.3f}" for name, size in memory.items() if size]
    lines += [f"  at most         {sum(memory.values()) / 1e9:10.3f}"]
    return "\n".join(lines)
