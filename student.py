"""The student g(eps, t): how it starts as its teacher's copy, how it is called, saved and loaded; and its critic.

    student = load_student("runs/tiny")
    condition = student.teacher.encode(["a red ankle boot on a yellow background"])
    images = student.teacher.decode(student(eps, 0, **condition))               # one forward pass, one image
"""

from pathlib import Path

import torch

from model import UNet
from plumbing.configs import Number, check, target_slot
from plumbing.files import BadInput, parsing, read_json, write_json
from plumbing.hub import TINY, find, resolve
from plumbing.layout import EXPORTED, fingerprint
from plumbing.weights import WEIGHTS, build, init_on_meta, read_tensors, weight_files, write_tensors
from signal_ode import clean_prediction, student_signal
from teacher import Teacher

REFINE_FROM = 5         # the teacher refines from time T / 5 on: found by trial
FASTEST = 2.0           # radians that a feature of the guidance scale may turn from w to w + 1


class Student:
    """g(eps, t): a trained network, the teacher whose condition and decoder it needs, and how it was trained.
    `input_time`: the fixed time i at which it reads its noise. `guidance`: the scale w that is built in, or a range
    [lo, hi] of scales that can be asked for. `fingerprint`: tells trained students apart; None before training.
    Raises BadInput for guidance of a teacher that can't be guided."""

    def __init__(self, network, teacher, input_time, guidance, fingerprint=None):
        self.network, self.teacher, self.input_time, self.guidance = network, teacher, input_time, guidance
        self.fingerprint = fingerprint
        self.ranged = isinstance(guidance, list)
        if teacher.uncond is None and guidance != 1:
            raise BadInput(f"teacher {teacher.spec} has no empty condition to lead away from: --guidance 1")

    def __call__(self, eps, t, w=None, **condition):
        """The signal y_t (B, C, h, w) of noise eps at target times t, int or (B,), 0..T; 0 is the clean end.
        `w`: float or (B,), needed by a student of a range of guidance scales, and without effect on another."""
        t = torch.as_tensor(t, device=eps.device).expand(len(eps))
        if self.ranged:
            condition["guidance"] = torch.as_tensor(w, device=eps.device).expand(len(eps))
        return student_signal(self.output, eps, t, self.input_time, self.teacher.schedule, **condition)

    def output(self, x_i, i, t, **condition):
        """The network's raw output (B, C, h, w) at the input time i, told the target times t (B,)."""
        timestep = torch.full((len(x_i),), self.teacher.schedule.timestep(i), device=x_i.device)
        return self.network(x_i, timestep, target=t, **condition)

    @torch.no_grad()
    def refine(self, eps, steps, w=None, **condition):
        """The sample g(eps, 0), (B, C, h, w), refined by steps of the teacher. It is noised again to time T / 5, with
        its own eps, and so many Euler steps bring it back on the trajectory of eps. They start from g(eps, 0) and
        not from g(eps, T / 5), because only the former is matched. `w`: the teacher's scale, and a ranged student's."""
        x = self(eps, 0, w=w, **condition)
        if steps == 0:
            return x
        grid = self.teacher.schedule.grid(REFINE_FROM * steps)[-1 - steps:]         # its last part, from T / 5 to 0
        return self.teacher.solve(eps, grid, space="y", start=x, w=w, **condition)

    def pick_guidance(self, w=None):
        """w if this student was trained for it, or BadInput. None: the scale built in, or the middle of its range."""
        lo, hi = self.guidance if self.ranged else (self.guidance, self.guidance)
        if w is not None and not lo <= w <= hi:
            allowed = f"{lo} to {hi}" if self.ranged else f"{lo}, which is built in"
            raise BadInput(f"--guidance {w} is not supported by this student: {allowed}")
        return (lo + hi) / 2 if w is None else w


class Critic:
    """h(x_t, t), the denoiser of the student's own samples that matching.py compares with the teacher: a network like
    the teacher's. For a range of guidance it is told w, as the student is."""

    def __init__(self, network, student):
        self.network, self.teacher, self.ranged = network, student.teacher, student.ranged

    def __call__(self, x_t, t, w=None, **condition):
        """The clean prediction (B, C, h, w) of x_t at times t (B,), 1..T. `w`: (B,), the scale of a ranged student."""
        if self.ranged:
            condition["guidance"] = w
        schedule = self.teacher.schedule
        return clean_prediction(self.network(x_t, schedule.timestep(t), **condition), x_t, t, schedule)


# -------------------------------------------------------------------------------------------------- before training
def teacher_weights(teacher, guidance, rank):
    """(config, tensors, where) of a network that is to be trained and starts as the teacher's, in float32. With a rank
    the teacher's weights are not copied: the network shares them as they are, and has additions of this rank in
    float32, whose second factors are zero. For a range of guidance it also has a projection of w's embedding, zero too.
    """
    path = teacher.unet_folder / "config.json"
    config, device = read_json(path), teacher.device
    if rank:
        config["lora_rank"], tensors = rank, dict(teacher.unet.state_dict())
        rng = torch.Generator().manual_seed(rank)
        for name, p in init_on_meta(UNet, config, path).state_dict().items():
            if name.endswith(".up.weight"):
                tensors[name] = torch.zeros(p.shape, device=device)
            if name.endswith(".down.weight"):               # of unit variance, if the input has that
                tensors[name] = (torch.randn(p.shape, generator=rng) * p[0].numel() ** -0.5).to(device)
    else:
        tensors = read_tensors(weight_files(teacher.unet_folder), device, torch.float32)
    if isinstance(guidance, list):
        config["time_cond_proj_dim"] = 256                  # the width that latent consistency models have
        config["time_cond_fastest"] = FASTEST
        tensors["time_embedding.cond_proj.weight"] = torch.zeros(config["block_out_channels"][0], 256, device=device)
    return config, tensors, path


def new_student(teacher, input_time, guidance, rank=0):
    """A student that equals its teacher before training, float32. It has the teacher's weights and an embedding of the
    target time, which is a copy of the teacher's time embedding with a last layer of zeros. So g(eps, t) is the
    teacher's prediction of sigma_i * eps at i, neither guided nor clipped, for every t and w. `rank`: of a LoRA, whose
    weights are the teacher's own; 0 for a network of its own."""
    config, tensors, where = teacher_weights(teacher, guidance, rank)
    slot = target_slot(config)
    config[f"{slot}_embed_type"] = "timestep"
    for kind in ("weight", "bias"):
        layer_1, layer_2 = (tensors[f"time_embedding.linear_{n}.{kind}"].float() for n in (1, 2))
        tensors[f"{slot}_embedding.linear_1.{kind}"] = layer_1.clone()
        tensors[f"{slot}_embedding.linear_2.{kind}"] = torch.zeros_like(layer_2)
    return Student(build(UNet, config, tensors, where), teacher, input_time, guidance)


def set_trainable(network):
    """Choose what of a student's network learns: all but its norms and biases and its first and last layer, which stay
    the teacher's. So all that it learns fits into the matrices of a LoRA that every program reads (tools.export), at no
    cost in quality that shows (tiny/README.md). The embeddings of time and guidance learn all of theirs: for one t and
    w they are one vector, which export can fold. Of a LoRA all that is its own learns."""
    for name, p in network.own_parameters().items():
        p.requires_grad_(learns(name, p))


def learns(name, p):
    """Whether a student's parameter of this name learns, see set_trainable."""
    return p.ndim > 1 and not name.startswith(("conv_in.", "conv_out.")) or "_embedding." in name


def new_critic(student):
    """The critic of a student, which equals the unguided teacher before training, float32; a LoRA if the student is.
    All that is its own learns, because a critic is not exported."""
    rank = student.network.settings["lora_rank"]
    network = build(UNet, *teacher_weights(student.teacher, student.guidance, rank))
    for p in network.own_parameters().values():
        p.requires_grad_(True)
    return Critic(network, student)


# ------------------------------------------------------------------------------------------------------ the folder
def save_student(folder, student, tensors=None, dtype=torch.float32):
    """Write config.json and weights, which diffusers opens as they are, unless there are labels or it is a LoRA, and
    student.json, what this code needs to call the student. Raises BadInput.
    `tensors`: its weights, where they are not those that the network has now. A LoRA's are without the teacher's."""
    folder, teacher = Path(folder), student.teacher
    write_json(folder / "config.json", student.network.config)
    write_json(folder / "student.json", {
        "teacher": teacher.spec, "fingerprint": teacher.fingerprint, "input_time": student.input_time,
        "guidance": student.guidance, "negative_prompt": teacher.negative_prompt})
    write_tensors(folder / WEIGHTS, tensors or student.network.own_parameters(), dtype)


def load_student(folder=TINY / "student", teacher=None, device="cpu", dtype=torch.float32):
    """The student in a folder or hub repository, or in its `student/` as train.py leaves it.
    `teacher`: a name or folder, instead of the one that the student names. Raises BadInput if the folder holds no
    student, or one of another teacher."""
    folder, _ = find(folder)
    folder = folder / "student" if (folder / "student" / "student.json").exists() else folder
    path = folder / "student.json"
    if not path.exists():
        exported = EXPORTED in read_json(folder / "scheduler" / "scheduler_config.json", default={})
        kind = "a student for other programs, by tools.export" if exported else "no student (no student.json)"
        raise BadInput(f"{folder} holds {kind}: give the folder that train.py wrote")
    info = read_json(path)
    with parsing(path):
        spec, negative_prompt = str(info["teacher"]), str(info["negative_prompt"])
        w, i = info["guidance"], info["input_time"]
        scales = w if isinstance(w, list) else [w, w]
        for scale in scales:
            check("guidance", scale, [Number(float, -1e4, 1e4)])
        check("guidance", w, "a number, or a list of the lowest and the highest",
              len(scales) == 2 and scales[0] <= scales[1])
    try:
        teacher = Teacher(*resolve(teacher or spec), device, dtype)
    except BadInput as error:
        raise BadInput(f"{error} (the teacher of {folder}; --teacher says where it is now)") from None
    if info["fingerprint"] != teacher.fingerprint:
        raise BadInput(f"the student in {folder} was made for another teacher than {teacher.spec}: "
                       f"fingerprint {info['fingerprint']}, not {teacher.fingerprint}")
    teacher.set_negative_prompt(negative_prompt)
    with parsing(path):
        check("input_time", i, [Number(int, 1, teacher.schedule.T)])
    config, files = read_json(folder / "config.json"), weight_files(folder)
    tensors, own = read_tensors(files, device, dtype), fingerprint(files, teacher.schedule, i)
    if config.get("lora_rank"):
        tensors = teacher.unet.state_dict() | tensors
    network = build(UNet, config, tensors, files[0])
    with parsing(folder / "config.json"):                   # the student's network is the teacher's, and has its inputs
        for key, value in network.settings.items():
            if key == f"{target_slot(teacher.settings)}_embed_type":
                check(key, value, ["timestep"])
            elif not key.startswith(("time_cond", "lora_rank")):
                check(key, value, f"{teacher.settings[key]!r}, as the teacher has", value == teacher.settings[key])
        width = network.settings["time_cond_proj_dim"]
        check("time_cond_proj_dim", width, "null, but for a range of guidance", bool(width) == isinstance(w, list))
    return Student(network, teacher, i, w, own)
