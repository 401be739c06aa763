"""The loop that one would write on diffusers and transformers to train the same: what train.py is timed against.

    loop = Loop(teacher, args, prompts, match_from)         # args: train.py's, settled
    loop.step(k, lr)

The same weights, draws and mathematics, loss by loss; the libraries' networks, text encoder and average, and torch's
AdamW as it comes. Of a teacher of text, on one device.
"""

import functools

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel, CLIPTokenizer

import train
from matching import critic_loss, limited_guidance, matching_loss
from signal_ode import add_noise, bootstrap_loss, boundary_loss, cfg, clean_prediction, student_signal
from student import set_trainable


class Loop:
    """teacher: ours, of which it takes folder, schedule, device and precision. match_from: the first matched step."""

    def __init__(self, teacher, args, prompts, match_from):
        self.args, self.prompts, self.match_from = args, prompts, match_from
        self.schedule, self.shape = teacher.schedule, teacher.shape
        self.device, self.dtype, folder = teacher.device, teacher.dtype, teacher.folder
        unet = functools.partial(UNet2DConditionModel.from_pretrained, folder, subfolder="unet",
                                 low_cpu_mem_usage=False)                   # for weights that are not in the file
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=self.dtype)
        self.text.to(self.device)
        self.empty = self.encode([args.negative_prompt])
        self.unet = unet(torch_dtype=self.dtype).to(self.device).requires_grad_(False)
        self.network = unet(class_embed_type="timestep").train()            # an embedding of the target time, zero
        self.network.class_embedding.load_state_dict(self.network.time_embedding.state_dict())
        for p in self.network.class_embedding.linear_2.parameters():
            torch.nn.init.zeros_(p)
        self.critic_network = unet().train()
        self.networks = {"network": self.network.to(self.device), "critic_network": self.critic_network.to(self.device)}
        adam = functools.partial(torch.optim.AdamW, betas=(train.MATCH_BETA_1, 0.99), weight_decay=0.0)
        set_trainable(self.network)
        self.optimizer = adam([p for p in self.network.parameters() if p.requires_grad], args.lr)
        self.critic_optimizer = adam(self.critic_network.parameters(), args.critic_lr)
        self.ema = EMAModel(self.network.parameters(), decay=args.ema)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")
        self.limited = functools.partial(limited_guidance, self.denoise, share=args.match_guidance,
                                         until=args.match_until * self.schedule.T)

    @torch.no_grad()
    def encode(self, prompts):
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt",
                                max_length=self.tokenizer.model_max_length)
        return self.text(tokens.input_ids.to(self.device)).last_hidden_state

    def denoise(self, x_t, t, w, text):
        """The teacher's guided clean prediction: both conditions in one batch, as in the pipelines."""
        x_t, t, text = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, self.empty.expand_as(text)])
        with torch.autocast(self.device.type, enabled=False):
            out = self.unet(x_t.to(self.dtype), self.schedule.timestep(t), text).sample
        return guide(*clean_prediction(out, x_t, t, self.schedule).chunk(2), w)

    def student(self, eps, t, w, text):
        return student_signal(self.output, eps, t, self.args.input_time, self.schedule, text=text)

    def output(self, x_i, i, t, text):
        index = torch.full((len(x_i),), self.schedule.timestep(i), device=self.device)
        return self.network(x_i, index, text, class_labels=t).sample

    def critic(self, x_t, t, w, text):
        out = self.critic_network(x_t, self.schedule.timestep(t), text).sample
        return clean_prediction(out, x_t, t, self.schedule)

    def step(self, k, lr):
        args, schedule = self.args, self.schedule
        matches, critic_learns = k >= self.match_from, k >= self.match_from - args.warmup
        on_path = not matches or (k + 1) % train.PATH_EVERY == 0
        mixed = functools.partial(train.autocast, self.device, self.dtype)
        self.optimizer.param_groups[0] |= {"lr": lr, "betas": (train.MATCH_BETA_1 if matches else train.BETA_1, 0.99)}
        self.optimizer.zero_grad()
        self.critic_optimizer.zero_grad()
        for first in range(0, args.batch, args.micro_batch):
            samples = range(first, first + args.micro_batch)
            prompt, *drawn = train.draw(args.seed, k, samples, self.shape, schedule.T, len(self.prompts), args.guidance)
            eps, t, w, n, tau = (tensor.to(self.device) for tensor in drawn)
            s = (t - round(schedule.T / args.num_steps)).clamp(min=0)
            text = self.encode([self.prompts[p] for p in prompt])
            condition = {"w": w, "text": text}
            few = train.boundary_samples(args, first)
            if on_path and len(eps[few]):
                with mixed():
                    L_BC = boundary_loss(self.student, self.denoise, eps[few], schedule, w=w[few], text=text[few])
                self.backward(args.boundary_weight / len(range(0, args.batch, train.BOUNDARY_EVERY)), L_BC)
            if on_path:
                with mixed():
                    L_BS = bootstrap_loss(self.student, self.denoise, eps, t, s, schedule, args.solver, **condition)
                self.backward(1 / args.batch, L_BS)
            if critic_learns:
                with mixed(), torch.set_grad_enabled(matches):
                    x = self.student(eps, torch.zeros_like(t), **condition)
            if matches:
                with mixed():
                    L_M, _ = matching_loss(x, self.limited, self.critic, n, tau, schedule, **condition)
                self.backward(args.match / args.batch, L_M)
            if critic_learns:
                with mixed():
                    h = self.critic(add_noise(x.detach(), n, tau, schedule), tau, **condition)
                    L_C = critic_loss(x.detach(), h, tau, schedule)
                self.backward(1 / args.batch, L_C)
        self.update(self.optimizer, self.network)
        if critic_learns:
            self.update(self.critic_optimizer, self.critic_network)
        self.scaler.update()
        self.ema.step(self.network.parameters())

    def backward(self, weight, loss):
        self.scaler.scale(weight * loss.sum()).backward()

    def update(self, optimizer, network):
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        self.scaler.step(optimizer)
