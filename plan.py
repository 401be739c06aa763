"""What a step of train.py takes, before it is taken: floating-point operations, and memory of passes.

    flops, passes = step_costs(student, critic, args, samples, num_boundary, num_pictures, autocast)

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

# Of a checkpoint's names, whose memory they are
STATE = {"network.": "student", "ema.": "average", "critic_network.": "critic", "critic_": "critic's Adam",
         "scaler": "Adam", "step.": "Adam", "exp_avg": "Adam"}
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
    twin = UNet(network.config)
    for p, real in zip(twin.parameters(), network.parameters()):
        p.data = p.data.to(real.dtype)
        p.requires_grad_(real.requires_grad)
    twin.checkpointing = network.checkpointing
    return twin

@contextlib.contextmanager
def counted(flops, name):
    """Note the operations of what is done there."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        yield
    flops[name] = counter.get_total_flops()

def step_costs(student, critic, args, samples, num_boundary, num_pictures, autocast):
    """({part: FLOPs}, bytes of gradients and of what the passes make, at most) of a micro-batch that has all of
    train.py's losses, and of painting.
    critic: or None. num_boundary: samples with a boundary loss. num_pictures: or 0. autocast: makes a context."""
    teacher, flops, ledger = copy.copy(student.teacher), {}, Ledger()
    schedule = teacher.schedule = copy.deepcopy(teacher.schedule)           # whose tables are to stay real ones
    limited = functools.partial(limited_guidance, teacher.denoise, share=args.match_guidance, until=schedule.T)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(teacher.device):
        teacher.unet = fake(teacher.unet)
        student = Student(fake(student.network), teacher, student.input_time, student.guidance)
        critic = critic and Critic(fake(critic.network), student)
        with ledger:
            with counted(flops, "text"):
                condition = teacher.encode([*teacher.labels, ""][:1] * samples)
            eps, n = torch.randn(2, samples, *teacher.shape)
            t = torch.full((samples,), schedule.T)
            if args.guidance != 1:
                condition["w"] = torch.ones(samples)
            with counted(flops, "BOOT"):
                with autocast():
                    L_BS, L_BC = boot_losses(student, teacher.denoise, eps, t, t - 1, schedule, slice(num_boundary),
                                             args.solver, **condition)
                (L_BS.sum() + L_BC.sum()).backward()
            if critic:
                with counted(flops, "matching"):
                    with autocast():
                        x = student(eps, 0, **condition)
                        L_M = matching_loss(x, limited, critic.denoise, n, t, schedule, **condition)
                    L_M.sum().backward()
                with counted(flops, "critic"):
                    with autocast():
                        L_C = critic_loss(x.detach(), critic.again, n, t, schedule, **condition)
                    L_C.sum().backward()
                del x, L_M, L_C
            del L_BS, L_BC
            with counted(flops, "decoding"), torch.no_grad(), autocast():
                if teacher.vae and num_pictures:
                    teacher.vae.decode(eps[:num_pictures])
    return flops, ledger.peak

def report(student, critic, state, args, batch, counts, prompts, autocast):
    """The lines of --dry-run: operations of a sample and of the run, and the memory of a process, part by part.
    state: the tensors of a checkpoint, by name. batch: (processes, micro-batches of each, samples of one, those of them
    with a boundary loss, pictures painted at once). counts: {part: steps of the run that have it}. prompts: bytes of
    those that are encoded once. autocast: makes a context."""
    processes, parts, samples, num_boundary, num_pictures = batch
    teacher, device = student.teacher, student.teacher.device
    flops, passes = step_costs(student, critic, args, samples, num_boundary, num_pictures, autocast)
    total = sum(flops[part] / samples * args.batch * steps for part, steps in counts.items())
    networks = {"teacher": teacher.unet, "VAE": teacher.vae, "text encoder": teacher.text_encoder}
    networks = {"student": student.network} | {name: part for name, part in networks.items() if part is not None}
    memory = {name: sum(local(p).nbytes for p in network.parameters()) for name, network in networks.items()}
    for name, tensor in state.items():
        part = next(part for prefix, part in STATE.items() if name.startswith(prefix))
        memory[part] = memory.get(part, 0) + (local(tensor).nbytes if part != "student" else 0)
    gradients = sum(p.numel() * p.element_size() for net in (student, critic) if net for p in net.network.parameters())
    memory |= {"prompts": prompts, "gradients": gradients, "passes": passes - gradients}
    if device.type == "cpu":
        saved = sum(tensor.nbytes for tensor in state.values())
        memory |= {"saving": 2 * saved if spare_memory() > 2 * saved else 0, "Python": PYTHON}
    rows = [f"  {name:13} {sum(p.numel() for p in network.parameters()) / 1e6:9.1f} M parameters"
            for name, network in networks.items()]
    rows += [f"a step          {args.batch} samples: {processes} processes x {parts} times {samples} at once"]
    rows += [f"  {part:13} {flops[part] / samples / 1e9:9.2f} GFLOP a sample, in {steps} steps"
             for part, steps in counts.items()]
    rows += [f"the run         {total:.3g} FLOP"]
    rows += [f"  {name:13} {size / 1e9:9.3f} GB" for name, size in memory.items() if size]
    rows += [f"at most         {sum(memory.values()) / 1e9:9.3f} GB of {device} in each process"]
    return "\n".join(rows)
