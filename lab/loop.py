"""The training of a one-step distiller, in one process and without checkpoints: begin here if train.py is too much.

    image_of, lab = distil(METHODS["SiD, a = 1"], load_teacher("tiny"), rate=1e-4)
    latents = image_of(eps, **condition)                    # one pass

A method is a function of lab/methods.py. A run ends when its network evaluations are spent, so that methods of
different cost can be compared. A forward pass of one sample is one evaluation, a backward pass to the weights is two
more, and a backward pass to the sample alone is one more. The student that counts is the average (EMA) of its weights.
"""

import copy
import functools

import torch

from matching import LEAST_SIGNAL, limited_guidance
from plumbing.prompts import encode_by_number, training_prompts
from signal_ode import clean_prediction
from student import Critic, Student, new_critic, new_student, set_trainable

BUDGET = 474_000        # evaluations of train.py's default run, before it also refined
BATCH, W, INPUT_TIME, EMA = 32, 3.0, 600, 0.99


def distil(method, teacher, rate, seed=0, budget=BUDGET, limited=False):
    """Train a student by a Method. Returns its picture, callable (eps, **condition) -> (B, C, h, w), and the lab.
    `limited`: guide the teacher as in matching, where alpha_t >= 0.288 alone."""
    lab = Lab(method, teacher, rate, seed, limited)
    prompts = training_prompts(teacher)
    encode = encode_by_number(teacher, prompts)
    while lab.spent < budget:
        lab.share = lab.spent / budget
        numbers = torch.randint(len(prompts), (BATCH,), generator=lab.rng).tolist()
        condition = {name: value.to(teacher.device) for name, value in encode(numbers).items()}
        lab.update(**method.losses(lab, lab.noise(), condition))
        lab.step += 1
        with torch.no_grad():
            decay = min(EMA, lab.step / (lab.step + 9))     # a shorter memory at first
            torch._foreach_lerp_(list(lab.average.parameters()), list(lab.networks["student"].parameters()), 1 - decay)
    if method.kind == "denoiser":
        return functools.partial(predict, Critic(lab.average, lab.student), t=teacher.schedule.T), lab
    return functools.partial(Student(lab.average, teacher, INPUT_TIME, W), t=0), lab


class Lab:
    """What a method works with.

        .schedule
        .f, .g, .D, .h, .twin           see lab/methods.py; of g and D one is the student
        .limited                        f, guided where alpha_t >= 0.288 alone
        .empty(condition), .scales(w, t)    what a critic's guidance takes: the empty condition, and w (B,)
        .noise(), .times()              fresh noise (B, C, h, w), and times (B,) between 0.02 T and 0.98 T
        .update(student=L, critic=L)    a step of Adam for each network that is named
        .frozen_copy()                  of a student D
        .step, .spent, .share           steps made, evaluations spent, their share of the budget
        .memory, .rng                   what a method keeps from step to step; the source of all that is drawn"""

    def __init__(self, method, teacher, rate, seed, limited):
        self.method, self.teacher, self.schedule, self.memory = method, teacher, teacher.schedule, {}
        self.step = self.spent = self.share = 0
        self.rng = torch.Generator().manual_seed(seed)
        self.limited = functools.partial(limited_guidance, teacher.denoise, schedule=teacher.schedule, w=W)
        self.f = self.limited if limited else functools.partial(teacher.denoise, w=W)
        self.student = self.g = new_student(teacher, INPUT_TIME, W)
        set_trainable(self.g.network)
        if method.kind == "denoiser":
            self.student = new_critic(self.g)               # the teacher's network as it is
            set_trainable(self.student.network)
            self.D = functools.partial(predict, self.student)
        self.average = copy.deepcopy(self.student.network).requires_grad_(False)
        self.networks, self.rates = {"student": self.student.network}, {"student": rate, "critic": rate * method.critic}
        if method.critic:
            self.h = new_critic(self.g)
            self.networks["critic"] = self.h.network
        self.adams = {}
        for name, network in self.networks.items():
            learned = [p for p in network.parameters() if p.requires_grad]
            self.adams[name] = torch.optim.AdamW(learned, weight_decay=0.0)
        for network in (teacher.unet, *self.networks.values()):
            count_evaluations(network, self)

    def empty(self, condition):
        return {name: self.teacher.uncond[name].expand_as(value) for name, value in condition.items()}

    def scales(self, w, t):
        limited = self.f is self.limited
        return torch.where(self.schedule.alpha(t) >= LEAST_SIGNAL, w, 1.0) if limited else torch.full_like(t, w).float()

    def twin(self, x_t, t, **condition):
        """The prediction of the student's own network, told x_t, and T as its target time."""
        out = self.student.network(x_t, self.schedule.timestep(t), target=torch.full_like(t, self.schedule.T),
                                   **condition)
        return clean_prediction(out, x_t, t, self.schedule)

    def frozen_copy(self):
        copied = new_critic(self.g)
        copied.network.load_state_dict(self.average.state_dict())
        count_evaluations(copied.network.requires_grad_(False), self)
        return functools.partial(predict, copied)

    def noise(self):
        return torch.randn(BATCH, *self.teacher.shape, generator=self.rng).to(self.teacher.device)

    def times(self):
        u = torch.rand(BATCH, generator=self.rng)
        return (self.schedule.T * (0.02 + 0.96 * u)).long().to(self.teacher.device)

    def update(self, **losses):
        sum(losses.values()).backward()
        ramp = dict(zip(("student", "critic"), self.method.ramp(self.share)))
        beta_1 = 0.0 if "critic" in losses else self.method.beta_1          # momentum would lag
        for name in losses:
            group = self.adams[name].param_groups[0]
            group |= {"lr": self.rates[name] * ramp[name], "betas": (beta_1, 0.99)}
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            self.adams[name].step()
        for adam in self.adams.values():
            adam.zero_grad()


def predict(denoiser, x_t, t, **condition):
    """The clean prediction at times t, an int or (B,). Of noise, at T, it is the picture of a student of this kind."""
    return denoiser(x_t, torch.as_tensor(t, device=x_t.device).expand(len(x_t)), **condition)


def count_evaluations(network, lab):
    """Count the passes of a network's samples in lab.spent, by hooks."""
    waiting = {}                                            # forward passes whose gradient is on the way to the weights

    def forward(_, inputs, out):
        lab.spent += len(out)
        if out.requires_grad:
            out.register_hook(functools.partial(backward, object()))

    def backward(number, gradient):
        waiting[number] = len(gradient)
        lab.spent += len(gradient)

    def to_weights(_):
        lab.spent += sum(waiting.values())
        waiting.clear()
    network.register_forward_hook(forward)
    weight = network.mid_block.resnets[0].conv1.weight
    if weight.requires_grad:
        weight.register_hook(to_weights)
