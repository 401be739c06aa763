"""The loop that one would write on diffusers and transformers for the same training; train.py is timed beside it.

    loop = Loop(teacher, prompts, args)                     # args: train.py's, with all defaults resolved
    for step in range(args.steps):
        loop.step(step)

`python -m dev.bench --step` runs it. It has the same weights, draws and rates as train.py and the plain losses of
signal_ode.py and matching.py, one after the other. Networks, tokenizer, text encoder and EMA are the libraries', and
AdamW is torch's default. After any number of steps its weights must be train.py's, up to rounding. It is for teachers
of text on one device, in float32 or bfloat16.
"""

import functools

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel, CLIPTokenizer

import train
from matching import critic_loss, identity_loss, limited_guidance
from plumbing.run import MAX_NORM
from signal_ode import add_noise, bootstrap_loss, boundary_loss, cfg, clean_prediction, student_signal
from student import learns


class Loop:
    """teacher: our Teacher, of which it takes the folder, schedule, device and dtype. .networks: {name: network} of
    what learns. The names are those of train.py's checkpoints."""

    def __init__(self, teacher, prompts, args):
        self.args, self.prompts = args, prompts
        self.schedule, self.shape = teacher.schedule, teacher.shape
        self.device, self.dtype, folder = teacher.device, teacher.dtype, teacher.folder
        self.critic_from, self.match_from, self.refine_from = train.phases(args, 0, 0)
        unet = functools.partial(UNet2DConditionModel.from_pretrained, folder, subfolder="unet",
                                 low_cpu_mem_usage=False)               # so that it accepts weights not in the file
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=self.dtype)
        self.text_encoder.to(self.device)
        self.uncond = self.encode([args.negative_prompt])
        self.unet = unet(torch_dtype=self.dtype).to(self.device).requires_grad_(False)
        student = unet(class_embed_type="timestep").to(self.device).train()             # the target time's embedding,
        student.class_embedding.load_state_dict(student.time_embedding.state_dict())    # whose last layer is zero
        for p in student.class_embedding.linear_2.parameters():
            torch.nn.init.zeros_(p)
        for name, p in student.named_parameters():
            p.requires_grad_(learns(name, p))
        self.networks = {"student": student, "critic": unet().to(self.device).train()}
        adam = functools.partial(torch.optim.AdamW, betas=(train.MATCH_BETA_1, train.BETA_2), weight_decay=0.0)
        self.adams = {"student": adam([p for p in student.parameters() if p.requires_grad], args.lr),
                      "critic": adam(self.networks["critic"].parameters(), args.critic_lr)}
        self.ema = EMAModel(student.parameters(), decay=args.ema)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    @torch.no_grad()
    def encode(self, prompts):
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt",
                                max_length=self.tokenizer.model_max_length)
        return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

    def teacher(self, x_t, t, w, text):
        """f(x_t, t), guided: with and without the prompt in one batch, as the pipelines do it."""
        x_t, t, text = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, self.uncond.expand_as(text)])
        with torch.autocast(self.device.type, enabled=False):
            out = self.unet(x_t.to(self.dtype), self.schedule.timestep(t), text).sample
        return cfg(*clean_prediction(out, x_t, t, self.schedule).chunk(2), w)

    def student(self, eps, t, w, text):
        return student_signal(self.student_output, eps, t, self.args.input_time, self.schedule, text=text)

    def student_output(self, x_i, i, t, text):
        timestep = torch.full((len(x_i),), self.schedule.timestep(i), device=self.device)
        return self.networks["student"](x_i, timestep, text, class_labels=t).sample

    def critic(self, x_t, t, w, text):
        out = self.networks["critic"](x_t, self.schedule.timestep(t), text).sample
        return clean_prediction(out, x_t, t, self.schedule)

    def step(self, step):
        """One step of train.py, before the student is refined."""
        args, schedule = self.args, self.schedule
        match, critic_learns = step >= self.match_from, step >= self.critic_from
        boot = not match or (step + 1) % train.BOOT_EVERY == 0
        rate = train.learning_rate(step, args, self.match_from, self.refine_from)
        beta_1 = train.MATCH_BETA_1 if critic_learns else train.BETA_1
        self.adams["student"].param_groups[0] |= {"lr": rate, "betas": (beta_1, train.BETA_2)}
        for adam in self.adams.values():
            adam.zero_grad()
        for first in range(0, args.batch, args.micro_batch):
            samples = range(first, first + args.micro_batch)
            numbers, *drawn = train.draw(args.seed, step, samples, self.shape, schedule.T, len(self.prompts),
                                         args.guidance)
            eps, t, w, n, tau = (tensor.to(self.device) for tensor in drawn)
            s = (t - round(schedule.T / args.num_steps)).clamp(min=0)
            condition = {"w": w, "text": self.encode([self.prompts[k] for k in numbers])}
            rows = slice(-first % train.BOUNDARY_EVERY, None, train.BOUNDARY_EVERY)
            if boot:
                with self.autocast():
                    L_BS = bootstrap_loss(self.student, self.teacher, eps, t, s, schedule, args.solver, **condition)
                (L_BS.sum() / args.batch).backward()
            if boot and args.beta and len(eps[rows]):
                some = {name: value[rows] for name, value in condition.items()}
                with self.autocast():
                    L_BC = boundary_loss(self.student, self.teacher, eps[rows], schedule, **some)
                (args.beta * L_BC.sum() / len(range(0, args.batch, train.BOUNDARY_EVERY))).backward()
            if critic_learns:
                with self.autocast(), torch.set_grad_enabled(match):
                    x = self.student(eps, torch.zeros_like(t), **condition)
            if match:
                self.networks["critic"].requires_grad_(False)               # L_M is to teach the student alone
                with self.autocast():
                    x_tau = add_noise(x, n, tau, schedule)
                    f = limited_guidance(self.teacher, x_tau, tau, schedule, **condition)
                    L_M = identity_loss(x, f, self.critic(x_tau, tau, **condition)).flatten(1).mean(1)
                (args.match * L_M.sum() / args.batch).backward()
                self.networks["critic"].requires_grad_(True)
            if critic_learns:
                x = x.detach()
                with self.autocast():
                    h = self.critic(add_noise(x, n, tau, schedule), tau, **condition)
                    L_C = critic_loss(x, h, tau, schedule)
                (L_C.sum() / args.batch).backward()
        for name, adam in self.adams.items():
            torch.nn.utils.clip_grad_norm_(self.networks[name].parameters(), MAX_NORM)
            adam.step()                                     # not the critic's before it learns: it has no gradient
        self.ema.step(self.networks["student"].parameters())
