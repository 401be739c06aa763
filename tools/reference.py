"""The training loop that one would write on diffusers and transformers: what train.py's is timed against.

    theirs = Loop(folder, args, teacher, prompts, match_from)         # args: train.py's, settled; a teacher of text
    theirs.step(k, lr)

The same weights, draws and arithmetic, and the same two files of mathematics; the reference libraries' networks, text
encoder and average, torch's optimizer as it comes, and nothing left out for being the same as before.
"""

import functools

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel, CLIPTokenizer

import train
from matching import critic_loss, limited_guidance, matching_loss
from signal_ode import bootstrap_loss, boundary_loss, clean_prediction, guide, student_signal
from teacher import PRECISION


class Loop:
    """folder: a teacher of text. teacher: ours, of which it takes the schedule and the shape of a sample."""

    def __init__(self, folder, args, teacher, prompts, match_from):
        self.args, self.prompts, self.match_from = args, prompts, match_from
        device = self.device = teacher.device
        self.schedule, self.shape, self.dtype = teacher.schedule, teacher.shape, PRECISION[args.precision]
        unet = functools.partial(UNet2DConditionModel.from_pretrained, folder, subfolder="unet")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=self.dtype).to(device)
        self.unet = unet(torch_dtype=self.dtype).to(device).requires_grad_(False)
        self.network, self.critic_network = unet(class_embed_type="timestep", low_cpu_mem_usage=False), unet()
        times, target = self.network.time_embedding, self.network.class_embedding
        target.load_state_dict(times.state_dict())
        for p in target.linear_2.parameters():
            torch.nn.init.zeros_(p)
        self.networks = {"network": self.network.to(device).train(), "critic_network": self.critic_network.to(device).train()}
        adam = functools.partial(torch.optim.AdamW, betas=(train.MATCH_BETA_1, 0.99), weight_decay=0.0)
        self.optimizer = adam(self.network.parameters(), args.lr)
        self.critic_optimizer = adam(self.critic_network.parameters(), args.critic_lr)
        self.ema = EMAModel(self.network.parameters(), decay=args.ema)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        self.limited = functools.partial(limited_guidance, self.denoise, share=args.match_guidance,
                                         until=args.match_until * self.schedule.T)

    @torch.no_grad()
    def encode(self, prompts):
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.tokenizer.model_max_length,
                                truncation=True, return_tensors="pt").input_ids
        return self.text(tokens.to(self.device)).last_hidden_state

    def denoise(self, x_t, t, w, text, empty):
        """The teacher's guided clean prediction: two conditions in one batch, as in the pipelines."""
        x_t, t, text = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, empty.expand_as(text)])
        with torch.autocast(self.device.type, enabled=False):
            out = self.unet(x_t.to(self.dtype), self.schedule.index(t), text).sample
        return guide(*clean_prediction(out, x_t, t, self.schedule).chunk(2), w)

    def student(self, eps, t, w, text, empty):
        return student_signal(self.raw, eps, t, self.args.input_time, self.schedule, text=text)

    def raw(self, x_i, i, t, text):
        index = torch.full((len(x_i),), self.schedule.index(i), device=self.device)
        return self.network(x_i, index, text, class_labels=t).sample

    def critic(self, x_t, t, w, text, empty):
        out = self.critic_network(x_t, self.schedule.index(t), text).sample
        return clean_prediction(out, x_t, t, self.schedule)

    def step(self, k, lr):
        args, schedule, device = self.args, self.schedule, self.device
        matches = k >= self.match_from
        critic_learns = k >= self.match_from - args.warmup
        on_path = not matches or (k + 1) % train.PATH_EVERY == 0
        self.optimizer.param_groups[0] |= {"lr": lr, "betas": (train.MATCH_BETA_1 if matches else train.BETA_1, 0.99)}
        self.optimizer.zero_grad()
        self.critic_optimizer.zero_grad()
        for first in range(0, args.batch, args.micro_batch):
            samples = range(first, first + args.micro_batch)
            prompt, *drawn = train.draw(args.seed, k, samples, self.shape, schedule.T, len(self.prompts), args.guidance)
            eps, t, w, n, tau = (tensor.to(device) for tensor in drawn)
            s = (t - round(schedule.T / args.num_steps)).clamp(min=0)
            text, empty = self.encode([self.prompts[p] for p in prompt]), self.encode([args.negative_prompt])
            condition = {"w": w, "text": text, "empty": empty}
            every = slice(-first % train.BOUNDARY_EVERY, None, train.BOUNDARY_EVERY)
            few = {"w": w[every], "text": text[every], "empty": empty}
            autocast = train.autocast(device, self.dtype)
            if on_path and len(eps[every]):
                with autocast:
                    loss = boundary_loss(self.student, self.denoise, eps[every], schedule, **few).sum()
                self.backward(args.boundary_weight / len(range(0, args.batch, train.BOUNDARY_EVERY)), loss)
            if on_path:
                with autocast:
                    loss = bootstrap_loss(self.student, self.denoise, eps, t, s, schedule, args.solver, **condition).sum()
                self.backward(1 / args.batch, loss)
            if critic_learns:
                with autocast, torch.set_grad_enabled(matches):
                    x = self.student(eps, 0 * t, **condition)
            if matches:
                with autocast:
                    loss = matching_loss(x, self.limited, self.critic, n, tau, schedule, **condition).sum()
                self.backward(args.match / args.batch, loss)
            if critic_learns:
                with autocast:
                    loss = critic_loss(x.detach(), self.critic, n, tau, schedule, **condition).sum()
                self.backward(1 / args.batch, loss)
        for optimizer, network in ((self.optimizer, self.network), (self.critic_optimizer, self.critic_network)):
            if optimizer is self.optimizer or critic_learns:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                self.scaler.step(optimizer)
        self.scaler.update()
        self.ema.step(self.network.parameters())

    def backward(self, weight, loss):
        self.scaler.scale(weight * loss).backward()
