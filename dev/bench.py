"""Speed, memory and agreement, beside the reference libraries: ours and theirs in turn, medians.

    python -m dev.bench                                     the embedded teacher's networks: loading, one pass
    python -m dev.bench --teacher FOLDER --parts vae        some networks of any teacher's folder
    python -m dev.bench --step                              steps of train.py beside those of dev/reference.py
    python -m dev.bench --step --alone --teacher FOLDER -- --micro-batch 4      only train.py's, with options of it
    python -m dev.bench --sampling --decoder tiny/decoder   one step beside the pipeline's guided fifty
    python -m dev.bench --agreement                         predictions and images of a GPU beside the CPU's
    python -m dev.bench --lora 64 --teacher FOLDER          a student's passes and its Adam, all weights beside a LoRA

    load, read, pass    seconds until a network is loaded, until all of its weights have been read, of one pass
    peak                peak memory: of loading, over the weights' size; of train.py, in GB
    ours, theirs        seconds of one training step, or of one batch from prompts to PNG files in memory
    ratio               how many times as fast as theirs ours is
    difference          of a pass: the largest one over the largest value; of trained weights: ||a - b|| / ||b||
    prediction, image   agreement: ||a - b|| / ||b|| of clean predictions; an image's largest difference, of 255

One should see differences below 1e-5 in fp32. On a CPU train.py's steps are about 1.2 times as fast as the reference
loop's, and one step of sampling is about 35 times as fast as fifty. On a GPU --step reports TFLOP/s, too.
Needs diffusers and transformers, except for --alone, --agreement and --lora.
"""

import contextlib
import functools
import importlib.util
import io
import math
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from model import VAE, TextEncoder, UNet
from plumbing.files import BadInput, check_new, command, new_parser, read_json, user_path, user_spec, write_json
from plumbing.hub import is_embedded, resolve
from plumbing.images import noise, to_pil
from plumbing.processes import PRECISION, peak_memory, pick_device, system_memory
from plumbing.prompts import training_prompts
from plumbing.run import Run
from plumbing.weights import STEM, load_module
from signal_ode import add_noise
from student import load_student, new_student, set_trainable
from teacher import load_teacher

# part -> our class, the stem of its weights' file, the library that has the reference
PARTS = {"unet": (UNet, STEM, "diffusers"), "vae": (VAE, STEM, "diffusers"),
         "text_encoder": (TextEncoder, "model", "transformers")}


@contextlib.contextmanager
def clock(device, seconds):
    """Append the seconds that the block takes to a list. A GPU is waited for at both ends."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - began)


def compare(ours, theirs):
    """The row of two lists of seconds, taken in turn; or of ours alone."""
    row = {"ours": statistics.median(ours)}
    if theirs:
        row |= {"theirs": statistics.median(theirs), "ratio": statistics.median(b / a for a, b in zip(ours, theirs))}
    return row


def report(title, rows):
    """Print {name: {column: number}}."""
    print(title)
    for name, row in rows.items():
        print(f"  {name:7} " + ", ".join(f"{column} {value:.4g}" for column, value in row.items()), flush=True)


# ----------------------------------------------------------------------------------------------- loading and one pass
def passes(part, config, args, device, dtype):
    """One pass on a random input: two functions, of our network and of theirs."""
    rng, batch = torch.Generator().manual_seed(0), args.batch or 1
    if part == "text_encoder":
        ids = torch.randint(config["vocab_size"], (batch, config["max_position_embeddings"]), generator=rng).to(device)
        return lambda ours: ours(ids), lambda theirs: theirs(ids).last_hidden_state
    levels = len(config["block_out_channels"]) if part == "vae" else 1
    side = args.size or config["sample_size"] // 2 ** (levels - 1)
    channels = config["latent_channels" if part == "vae" else "in_channels"]
    x = torch.randn(batch, channels, side, side, generator=rng).to(device, dtype)
    if part == "vae":
        return lambda ours: ours.decode(x), lambda theirs: theirs.decode(x / theirs.config.scaling_factor).sample
    t = torch.randint(1000, (batch,), generator=rng).to(device)
    if "cross_attention_dim" in config:
        text = torch.randn(batch, 77, config["cross_attention_dim"], generator=rng).to(device, dtype)
        return lambda ours: ours(x, t, text=text), lambda theirs: theirs(x, t, encoder_hidden_states=text).sample
    label = torch.zeros_like(t) if config.get("num_class_embeds") else None
    return lambda ours: ours(x, t, label=label), lambda theirs: theirs(x, t, class_labels=label).sample


@torch.no_grad()
def measure(whose, part, folder, args, device, dtype):
    """((load, read, peak, pass), output) of a network, of ours or of theirs. It needs a process of its own, so that
    the peak is its own."""
    config, (network, stem, library) = read_json(folder / "config.json"), PARTS[part]
    if whose == "theirs":                                   # imported first, because that does not count
        name = config.get("_class_name") or config["architectures"][0]
        reference = getattr(importlib.import_module(library), name)
    our_pass, their_pass = passes(part, config, args, device, dtype)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else system_memory("self/status", "VmRSS")
    began = time.perf_counter()
    if whose == "ours":
        call, network = our_pass, load_module(network, folder, device, dtype, stem)
    else:
        call, network = their_pass, reference.from_pretrained(folder, torch_dtype=dtype).to(device).eval()
    loaded = time.perf_counter()
    sum(p.sum().item() for p in network.parameters())
    read, peak = time.perf_counter(), peak_memory(device) - before
    call(network)                                           # the first pass does not count
    with clock(device, seconds := []):
        output = call(network)
    size = sum(p.nbytes for p in network.parameters())
    return (loaded - began, read - began, peak / size, *seconds), output.float().cpu().numpy()


def bench_networks(args, device, dtype):
    """Loading and one pass of a teacher's networks."""
    folder, _ = resolve(args.teacher)
    folders = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    folders, found = {"unet": folder} | folders, {}         # pixel models may keep theirs at the root
    for part in args.parts or folders:
        if part not in folders:
            raise BadInput(f"{args.teacher} has no {part}/")
        spawn, rows, outputs = multiprocessing.get_context("spawn"), {"ours": [], "theirs": []}, {}
        with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
            for whose in ("ours", "theirs") * args.repeat:
                job = processes.submit(measure, whose, part, folders[part], args, device, dtype)
                row, outputs[whose] = job.result()
                rows[whose].append(row)
        ours, theirs = outputs.values()
        found[part] = {whose: dict(zip(("load", "read", "peak", "pass"), map(statistics.median, zip(*measured))))
                       for whose, measured in rows.items()}
        found[part]["both"] = {"ratio": found[part]["theirs"]["pass"] / found[part]["ours"]["pass"],
                               "difference": float(abs(ours - theirs).max() / abs(theirs).max())}
        report(f"{part} of {args.teacher} in {args.precision} on {device}, {args.repeat} times", found[part])
    return found


# ----------------------------------------------------------------------------------------------------- training steps
def timed_steps(run, steps, loop, seconds, flops):
    """run.steps, and measure each of them. loop: a callable that returns dev/reference.py's loop, whose step comes
    before train.py's, or None. Fills in seconds, {kind of step: (train.py's, the loop's)}, each a list, and on a GPU
    flops, {kind: operations of train.py's step}."""
    _, match_from, _ = train.phases(run.args, 0, 0)
    for step in steps():
        kind = "BOOT"
        if step >= match_from:
            kind = "matched" if (step + 1) % train.BOOT_EVERY else "both"
        ours, theirs = seconds.setdefault(kind, ([], []))
        untimed = step < 2 or step in (match_from - 1, match_from)
        if untimed:                             # the first steps of a kind are slower; and the critic's head start
            ours, theirs = [], []
        counts = untimed and run.device.type == "cuda"
        counter = FlopCounterMode(display=False) if counts else contextlib.nullcontext()
        if loop:
            with clock(run.device, theirs):
                loop().step(step)
        with counter, clock(run.device, ours):
            yield step
        if counts:
            flops.setdefault(kind, counter.get_total_flops())


def reference_loop(run):
    """dev/reference.py's loop. Raises BadInput for options that it lacks."""
    teacher, args = run.teacher, run.args
    plain = teacher.condition_type == "prompt" and args.match and args.ema and args.guidance != 1
    if not plain or isinstance(args.guidance, list) or args.grad_checkpointing or args.precision == "fp16":
        raise BadInput("the loop on diffusers is for teachers of text and one guidance scale, and has no --match 0, "
                       "--ema 0, --grad-checkpointing or --precision fp16: measure train.py --alone")
    from dev.reference import Loop                          # which needs the reference libraries
    args.micro_batch = run.micro_batch
    return Loop(teacher, run.prompts, args)


def bench_steps(args, device, dtype):
    """Steps of train.py, as many of BOOT as matched ones, and none that refine."""
    given = {"teacher": args.teacher, "steps": 2 * args.steps, "match-from": 0.5, "warmup": 1, "every": 10**9,
             "samples": 0, "precision": args.precision, "device": device, "batch": args.batch}
    options = [str(part) for name, value in given.items() if value is not None for part in (f"--{name}", value)]
    seconds, flops, rows = {}, {}, {}
    # Saving is left out, because it would take longest.
    with tempfile.TemporaryDirectory() as out, mock.patch("plumbing.run.save"), mock.patch("train.REFINE_SHARE", 0):
        options = train.parse_args([*options, "--out", f"{out}/run", *args.options])
        with Run(options) as run, contextlib.redirect_stdout(io.StringIO()):
            loop = None if args.alone else functools.cache(functools.partial(reference_loop, run))
            run.steps = functools.partial(timed_steps, run, run.steps, loop, seconds, flops)
            train.train(options, run)
    for kind, (ours, theirs) in seconds.items():
        row = rows[kind] = compare(ours, theirs)
        row["samples/s"] = options.batch / row["ours"]
        if kind in flops:
            row["TFLOP/s"] = flops[kind] / row["ours"] / 1e12
    whole = {"peak": peak_memory(device) / 1e9}
    if not args.alone:
        whole = {"difference": max(differ(run.state, *network) for network in loop().networks.items())}
    report(f"steps of {options.batch} of {args.teacher} in {args.precision} on {device}, {run.micro_batch} at once",
           rows | {"all": whole})
    return {"rows": rows, **whole}


def differ(state, name, network):
    """||a - b|| / ||b|| of our weights in a run's state and a network of theirs."""
    pairs = [(state[f"{name}.{key}"], p.detach()) for key, p in network.named_parameters()]
    return math.sqrt(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


# ----------------------------------------------------------------------------------------------------------- sampling
@torch.no_grad()
def bench_sampling(args, device, dtype):
    """From prompts to PNG files in memory: a student's one step, and the reference pipeline's guided fifty of its
    teacher."""
    from diffusers import StableDiffusionPipeline
    batch, teacher = args.batch or 1, load_teacher(args.teacher, device, dtype)
    if teacher.condition_type != "prompt":
        raise BadInput("--sampling is for teachers of text")
    embedded, published = train.DEFAULTS["guidance"]
    w = embedded if is_embedded(args.teacher) else published
    student = load_student(device=device, dtype=dtype) if args.teacher == "tiny" else new_student(teacher, 600, w)
    student.network.to(dtype)
    decoders = {"one step": student.teacher.vae}
    if args.decoder:
        student.teacher.use_decoder(args.decoder)
        decoders["with the small decoder"] = student.teacher.vae
    pipeline = StableDiffusionPipeline.from_pretrained(
        teacher.folder, torch_dtype=dtype, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = training_prompts(teacher)[:batch]
    fifty, times = [], {name: [] for name in decoders}
    for k in range(-1, args.repeat):                        # the first round does not count, and has no fifty
        for name, student.teacher.vae in decoders.items():
            with clock(device, times[name]):
                eps = noise(range(batch), teacher.shape).to(device)
                latents = student(eps, 0, **student.teacher.encode(prompts))
                write_pngs(to_pil(student.teacher.decode(latents)))
        if k >= 0:
            with clock(device, fifty):
                write_pngs(pipeline(prompts, num_inference_steps=50, guidance_scale=w).images)
    rows = {name: compare(seconds[1:], fifty) for name, seconds in times.items()}
    report(f"{batch} samples of {args.teacher} at once in {args.precision} on {device}, {args.repeat} times", rows)
    return rows


def write_pngs(images):
    for image in images:
        image.save(io.BytesIO(), format="PNG")


# ---------------------------------------------------------------------------------------------------------- agreement
@torch.no_grad()
def bench_agreement(args, device, dtype):
    """A teacher's clean predictions and decoded images on the device in every precision, beside the CPU's in fp32."""
    exact, rows = load_teacher(args.teacher), {}
    eps, t = noise(range(2), exact.shape), torch.tensor([1, exact.schedule.T])
    x_t, prompts = add_noise(eps, eps, t, exact.schedule), training_prompts(exact)[:1] * 2
    f = exact.denoise(x_t, t, **exact.encode(prompts))
    images = exact.decode(f)
    for precision, dtype in PRECISION.items():
        teacher = load_teacher(args.teacher, device, dtype)
        ours = teacher.denoise(x_t.to(device), t.to(device), **teacher.encode(prompts)).cpu()
        decoded = teacher.decode(f.to(device)).cpu()
        rows[precision] = {"prediction": ((ours - f).norm() / f.norm()).item(),
                           "image": (decoded - images).abs().max().item() * 127.5}
    report(f"{args.teacher} on {device}, beside the CPU in fp32", rows)
    return rows


# -------------------------------------------------------------------------------------------- all weights, or a LoRA
def bench_lora(args, device, dtype):
    """Seconds of a student's forward and backward pass and of its step of Adam: of all weights, and of a LoRA. Blocks
    are computed again in the backward pass, unless the teacher is embedded."""
    rows, batch = {}, args.batch or (32 if is_embedded(args.teacher) else 1)
    teacher = load_teacher(args.teacher, device, dtype)
    condition = teacher.encode(training_prompts(teacher)[:1] * batch)
    eps, times = noise(range(batch), teacher.shape).to(device), torch.full((batch,), 500, device=device)
    for rank in (0, args.lora):
        student = new_student(teacher, teacher.schedule.T, 1.0, rank)
        set_trainable(student.network)
        student.network.checkpointing = not is_embedded(args.teacher)
        adam = torch.optim.AdamW([p for p in student.network.parameters() if p.requires_grad], 0.0, fused=True)
        seconds = {"forward": [], "backward": [], "Adam": []}
        for _ in range(args.repeat + 1):
            with clock(device, seconds["forward"]), torch.autocast(device.type, dtype, dtype != torch.float32):
                loss = student(eps, times, **condition).square().mean()
            with clock(device, seconds["backward"]):
                loss.backward()
            with clock(device, seconds["Adam"]):
                adam.step()
            adam.zero_grad()
        rows[f"rank {rank}" if rank else "all"] = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    report(f"{args.teacher}, {batch} samples, seconds", rows)
    return rows


def main():
    parser = new_parser(__doc__)
    option = parser.add_argument
    option("--teacher", type=user_spec, default="tiny", help="its name, or its folder in the diffusers layout")
    option("--precision", choices=list(PRECISION), default="fp32")
    option("--batch", type=int, help="(default: 1; with --step, train.py's)")
    option("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    option("--json", type=user_path, help="write what was measured to this file, too")
    option("--repeat", type=int, default=5, help="of loading, passes and sampling (default: %(default)s)")
    option("--parts", nargs="+", choices=list(PARTS), help="which networks (default: all there are)")
    option("--size", type=int, help="height and width of the networks' input (default: the config's)")
    option("--step", action="store_true", help="time whole training steps")
    option("--alone", action="store_true", help="with --step: without the loop on diffusers")
    option("--steps", type=int, default=22, help="of BOOT, and as many matched ones (default: %(default)s)")
    option("--sampling", action="store_true", help="time one step and the reference pipeline's fifty")
    option("--decoder", type=user_spec, help="with --sampling: a small decoder, as in sample.py")
    option("--agreement", action="store_true", help="compare the device with the CPU")
    option("--lora", type=int, metavar="RANK", help="compare training all weights with a LoRA of this rank")
    option("options", nargs="*", help="with --step, after --: train.py's, such as -- --micro-batch 4")
    args = parser.parse_args()
    if min(args.repeat, *(1 if n is None else n for n in (args.batch, args.size, args.lora))) < 1 or args.steps < 6:
        parser.error("--repeat, --batch, --size and --lora are 1 or more; --steps is 6 or more, for one of each kind")
    if args.options and not args.step:
        parser.error("options of train.py go with --step")
    if args.json:
        check_new(args.json)
    if not (args.alone or args.agreement or args.lora or importlib.util.find_spec("diffusers")):
        raise BadInput("the reference libraries are not installed: pip install diffusers transformers")
    modes = {"step": bench_steps, "sampling": bench_sampling, "agreement": bench_agreement, "lora": bench_lora}
    bench = next((modes[name] for name in modes if getattr(args, name)), bench_networks)
    found = bench(args, pick_device(args.device), PRECISION[args.precision])
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    command(main)
