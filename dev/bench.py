"""Against the reference libraries, ours and theirs in turn, medians: loading and passes, training steps, sampling.

    python -m tools.bench                                   the embedded teacher: U-Net, VAE, text encoder
    python -m tools.bench --teacher FOLDER --repeat 3       any teacher's folder
    python -m tools.bench --teacher FOLDER --parts vae      some of its networks
    python -m tools.bench --step                            train.py's steps beside those of tools/reference.py
    python -m tools.bench --step --alone --teacher FOLDER -- --micro-batch 4    only train.py's, with options of it
    python -m tools.bench --sampling                        one step beside the pipeline's guided fifty
    python -m tools.bench --pictures 10000                  sample.py beside its bare networks

Needs `pip install diffusers transformers`, but with --alone or --pictures.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

import train
from plumbing.files import BadInput, command, read_json, write_json
from plumbing.hub import resolve
from plumbing.weights import STEM, load_module
from model import TextEncoder, UNet, VAE
from tools.plan import Plan
from plumbing.checkpoints import Saver
from plumbing.processes import peak_memory, system_memory
from REMOVED import list_jobs, paint_jobs
from student import load_student, new_critic, new_student, set_trainable
from plumbing.images import noise, to_pil
from plumbing.processes import PRECISION, pick_device
from plumbing.prompts import training_prompts
from teacher import load_teacher
from dev.kill import read_state

# part -> our class, the stem of its weights' file, the library that has the reference
PARTS = {"unet": (UNet, STEM, "diffusers"), "vae": (VAE, STEM, "diffusers"),
         "text_encoder": (TextEncoder, "model", "transformers")}


def ours(part, folder, device, dtype):
    network, stem, _ = PARTS[part]
    return load_module(network, folder, device, dtype, stem)


def need(library):
    """A reference library. Raises BadInput."""
    try:
        return importlib.import_module(library)
    except ImportError:
        raise BadInput(f"the reference library is not installed: pip install {library}") from None


def reference(part, folder):
    """The reference library's class for a folder."""
    config, library = read_json(folder / "config.json"), PARTS[part][2]
    return getattr(need(library), config.get("_class_name") or config["architectures"][0])


def theirs(part, folder, device, dtype):
    return reference(part, folder).from_pretrained(folder, torch_dtype=dtype).to(device).eval().requires_grad_(False)


LOADERS = {"ours": ours, "theirs": theirs}


def measure_loading(which, part, folder, device, dtype):
    """In a process of its own: seconds to load, and until every weight was read; peak memory over the start."""
    if which == "theirs":
        reference(part, folder)                             # its imports are not counted
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else system_memory("self/status", "VmRSS")
    began = time.perf_counter()
    network = LOADERS[which](part, folder, device, dtype)
    loaded = time.perf_counter()
    sum(p.sum().item() for p in network.parameters())
    read = time.perf_counter()
    peak = peak_memory(device) - before
    size = sum(p.nbytes for p in network.parameters())
    return {"load": loaded - began, "read": read - began, "peak": peak / size, "size": size}


def passes(part, config, size, batch, device, dtype):
    """One forward pass of ours and of theirs on the same random input, as functions of the network."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=rng).to(device, dtype)
    if part == "text_encoder":
        ids = torch.randint(config["vocab_size"], (batch, config["max_position_embeddings"]), generator=rng).to(device)
        return lambda n: n(ids), lambda n: n(ids).last_hidden_state
    if part == "vae":
        side = size or config["sample_size"] // 2 ** (len(config["block_out_channels"]) - 1)
        z = draw(batch, config["latent_channels"], side, side)
        return lambda n: n.decode(z), lambda n: n.decode(z / n.config.scaling_factor).sample
    side = size or config["sample_size"]
    x, t = draw(batch, config["in_channels"], side, side), torch.randint(1000, (batch,), generator=rng).to(device)
    if config["_class_name"] == "UNet2DModel":
        label = torch.zeros(batch, dtype=torch.int64, device=device) if config.get("num_class_embeds") else None
        return lambda n: n(x, t, label=label), lambda n: n(x, t, class_labels=label).sample
    text = draw(batch, 77, config["cross_attention_dim"])
    return lambda n: n(x, t, text=text), lambda n: n(x, t, encoder_hidden_states=text).sample


@torch.no_grad()
def measure_forward(part, folder, device, dtype, size, batch, repeat, compiled):
    """Medians of one forward pass of both, in turn, and the largest difference over the largest value."""
    networks = {name: load(part, folder, device, dtype) for name, load in LOADERS.items()}
    calls = dict(zip(LOADERS, passes(part, networks["ours"].config, size, batch, device, dtype)))
    if compiled:
        calls = {name: torch.compile(call) for name, call in calls.items()}
    times, outputs = {name: [] for name in networks}, {}
    for _ in range(repeat + 1):                             # the first is not counted
        for name, network in networks.items():
            wait(device)
            began = time.perf_counter()
            outputs[name] = calls[name](network).float()
            wait(device)
            times[name].append(time.perf_counter() - began)
    a, b = outputs["ours"], outputs["theirs"]
    error = ((a - b).abs().max() / b.abs().max()).item()
    return {name: statistics.median(values[1:]) for name, values in times.items()}, error


def in_subprocess(inner):
    """What this command, started again in a process of its own, measures there."""
    done = subprocess.run([sys.executable, "-m", "tools.bench", "--inner", inner, *sys.argv[1:]], capture_output=True,
                          text=True)
    if done.returncode:
        raise BadInput(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])


def bench(part, folder, args):
    """Print what is measured of one network. Returns it."""
    device, dtype = pick_device(args.device), PRECISION[args.precision]
    reference(part, folder)                                 # not there: said before anything is measured
    rows = {name: [] for name in LOADERS}
    for _ in range(args.repeat):
        for name in LOADERS:
            rows[name].append(in_subprocess(f"{name} {part}"))
    size = rows["ours"][0]["size"]
    found = {name: {key: statistics.median(row[key] for row in measured) for key in ("load", "read", "peak")}
             for name, measured in rows.items()}
    print(f"{folder}, {size / 1e9:.2f} GB in {args.precision} on {device}, medians of {args.repeat}")
    for name, row in found.items():
        print(f"  {name:6}  load {row['load']:6.2f} s, every weight read {row['read']:6.2f} s, peak memory "
              f"{row['peak']:.2f} x the size")
    for compiled in (False, True) if args.compile else (False,):
        row, error = measure_forward(part, folder, device, dtype, args.size, args.batch or 1, args.repeat, compiled)
        a, b = row.values()
        found["compiled" if compiled else "forward"] = row | {"ratio": a / b, "difference": error}
        print(f"  forward{' compiled' * compiled}: ours {a:.4f} s, theirs {b:.4f} s, ratio {a / b:.3f}, "
              f"difference {error:.1e} of the largest value", flush=True)
    return found


class Clock:
    """.seconds inside the networks, their forward and backward passes, while it is on. A GPU is waited for at both ends
    of each, so that nothing overlaps."""

    def __init__(self, device):
        self.device, self.seconds = device, 0.0

    def around(self, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            wait(self.device)
            began = time.perf_counter()
            result = function(*args, **kwargs)
            wait(self.device)
            self.seconds += time.perf_counter() - began
            return result
        return timed

    @contextlib.contextmanager
    def on(self):
        with contextlib.ExitStack() as stack:
            for owner, name in ((UNet, "forward"), (TextEncoder, "forward"), (torch.Tensor, "backward"),
                                (torch.autograd, "grad")):
                stack.enter_context(mock.patch.object(owner, name, self.around(getattr(owner, name))))
            yield


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(call, device, repeat):
    """Median time of a call, after two that are not counted."""
    times = []
    for _ in range(repeat + 2):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def matmul_rate(device, dtype, repeat=10):
    """FLOP/s of a large product of random matrices: what this machine can do."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / median_seconds(lambda: a @ b, device, repeat)


class Steps:
    """.seconds of train.py's steps by number, taken where its loop asks for a learning rate: at their beginning.
    .match_from: the first matched one. clock: then .inside has the seconds in the networks. reference: makes a .loop of
    train.py's arguments and .match_from, whose steps go in turn with train.py's and take .reference_seconds."""

    def __init__(self, device, clock=None, reference=None):
        self.device, self.clock, self.reference, self.loop = device, clock, reference, None
        self.seconds, self.inside, self.reference_seconds, self.began = {}, {}, {}, None
        self.learning_rate = train.learning_rate

    def __call__(self, step, args, match_from):
        wait(self.device)
        self.match_from = match_from
        now, lr = time.perf_counter(), self.learning_rate(step, args, match_from)
        if self.began is not None:
            self.seconds[step - 1] = now - self.began
        if self.clock:
            self.inside[step - 1], self.clock.seconds = self.clock.seconds, 0.0
        if self.reference:
            self.loop = self.loop or self.reference(args, match_from)
            began = time.perf_counter()
            self.loop.step(step, lr)
            wait(self.device)
            self.reference_seconds[step] = time.perf_counter() - began
        self.began = time.perf_counter()
        return lr

    def train(self, options):
        """Run train.py with these options. Its last step is not measured."""
        with mock.patch.object(train, "learning_rate", self), mock.patch.object(sys, "argv", ["train.py", *options]):
            train.main()
        return self


# what a step of train.py does -> the parts of it
KINDS = {"BOOT": ("BOOT",), "matched": ("matching", "critic"), "both": ("BOOT", "matching", "critic")}


def kind(step, match_from):
    """What a step of train.py does; None for the first ones of each kind, which are slower, and the critic's own."""
    if step == match_from or step == match_from - 1 or step < 2:
        return None
    return "BOOT" if step < match_from else "both" if (step + 1) % train.PATH_EVERY == 0 else "matched"


def step_options(args, out="unused"):
    """train.py's, for so many steps of BOOT as matched ones."""
    options = {"teacher": args.teacher, "out": out, "steps": 2 * args.steps, "match-from": 0.5, "warmup": 1,
               "precision": args.precision, "save-every": 10**9, "sample-every": 0, "device": args.device,
               "batch": args.batch}
    options = [str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    options += args.options
    _, micro_batch = train.split_batch(train.parse_args(options), 1)
    return [*options, "--micro-batch", str(micro_batch)]


def measure_steps(args, clock=None):
    """{kind: median seconds of train.py's steps} and peak memory; or, with a clock, {kind: share outside the networks}.
    """
    device, rows = pick_device(args.device), {}
    with tempfile.TemporaryDirectory() as out, mock.patch.object(Saver, "save"):            # which would take longest
        with clock.on() if clock else contextlib.nullcontext():
            steps = Steps(device, clock).train(step_options(args, Path(out) / "run"))
    for step, seconds in steps.seconds.items():
        if name := kind(step, steps.match_from):
            rows.setdefault(name, []).append(1 - steps.inside[step] / seconds if clock else seconds)
    return {"rows": {name: statistics.median(values) for name, values in rows.items()}, "peak": peak_memory(device)}


def measure_both(args):
    """{kind: medians of our seconds, the reference loop's, and their ratio} of steps in turn; and how far the weights
    are apart after all of them."""
    rows = {}
    with tempfile.TemporaryDirectory() as out:
        steps = Steps(pick_device(args.device), reference=reference_loop)
        steps.train(step_options(args, Path(out) / "run"))
        state = read_state(Path(out) / "run")
    difference = max(differ(state, name, network) for name, network in steps.loop.networks.items())
    for step, ours in steps.seconds.items():
        if name := kind(step, steps.match_from):
            theirs = steps.reference_seconds[step]
            rows.setdefault(name, []).append((ours, theirs, theirs / ours))
    names = ("ours", "theirs", "ratio")
    return {"rows": {name: dict(zip(names, map(statistics.median, zip(*row)))) for name, row in rows.items()},
            "difference": difference}


def count_flops(args):
    """{part: FLOPs of a step} of train.py with these options."""
    device, args = pick_device(args.device), train.parse_args(step_options(args))
    teacher = load_teacher(args.teacher, device, PRECISION[args.precision])
    train.settle(args, teacher)
    student = new_student(teacher, args.input_time, args.guidance)
    critic = new_critic(student) if args.match else None
    set_trainable(student.network)
    if critic:
        critic.network.requires_grad_(True)
    mixed = functools.partial(train.autocast, device, teacher.dtype)
    flops = Plan(student, critic, args, mixed).flops(train.boundary_samples(args, 0))
    return {part: count * args.batch for part, count in flops.items()}


def bench_steps(args):
    """Print what is measured of train.py's steps, beside the reference loop unless alone. Returns it."""
    device, batch = pick_device(args.device), train.parse_args(step_options(args)).batch
    joint = {} if args.alone else in_subprocess("both")
    timed, outside, flops = (in_subprocess(inner) for inner in ("steps", "outside", "flops"))
    if not timed["rows"]:
        raise BadInput("no step to measure: two or more --steps, six for one of each kind")
    limit = matmul_rate(device, PRECISION[args.precision])
    found = {"peak": timed["peak"], "flops": flops, "difference": joint.get("difference"), "rows": {}}
    print(f"{args.teacher}, steps of {batch} in {args.precision} on {device}, medians; peak memory "
          f"{found['peak'] / 1e9:.2f} GB; a large matrix product has {limit / 1e12:.3g} TFLOP/s")
    for name, seconds in timed["rows"].items():
        rate = sum(flops[part] for part in KINDS[name]) / seconds
        row = found["rows"][name] = {
            "seconds": seconds, "samples/s": batch / seconds, "FLOP/s": rate, "utilisation": rate / limit,
            "outside": outside["rows"][name], **joint.get("rows", {}).get(name, {})}
        print(f"  {name:8} {seconds:.4f} s, {batch / seconds:.1f} samples/s, {rate / 1e12:.3g} TFLOP/s, "
              f"{rate / limit:.0%} of the product's, {row['outside']:.1%} outside the networks")
        if joint:
            print(f"           in turn: ours {row['ours']:.4f} s, theirs {row['theirs']:.4f} s, "
                  f"{row['ratio']:.3f} times as fast")
    print("  GFLOP of a step: " + ", ".join(f"{part} {count / 1e9:.2f}" for part, count in flops.items()))
    if joint:
        print(f"  after all steps the two are {found['difference']:.1e} apart (||a - b|| / ||b|| of the weights)")
    return found


def reference_loop(args, match_from):
    """tools/reference.py's, with train.py's arguments. Raises BadInput for those that it knows nothing of."""
    need("diffusers"), need("transformers")
    from dev.reference import Loop
    device = pick_device(args.device)
    teacher = load_teacher(args.teacher, device, PRECISION[args.precision])
    known = teacher.condition_type == "prompt" and args.match and args.ema and not (
        args.weight or args.guidance == 1 or isinstance(args.guidance, list) or args.grad_checkpointing)
    if not known or args.critic_updates > 1:
        raise BadInput("the loop on diffusers is for teachers of text, with one guidance scale, without --match 0, "
                       "--ema 0, --weight, --critic-updates or --grad-checkpointing: measure train.py --alone")
    return Loop(teacher, args, training_prompts(teacher, args.prompts), match_from)


def differ(state, name, network):
    """||a - b|| / ||b|| of our weights in a checkpoint and a network of theirs."""
    ours, theirs = zip(*((state[f"{name}.{key}"], p.detach().cpu()) for key, p in network.named_parameters()))
    return math.sqrt(sum((a - b).square().sum() for a, b in zip(ours, theirs)) / sum(b.square().sum() for b in theirs))


def png(picture):
    """A picture as a PNG file in memory."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@torch.no_grad()
def bench_sampling(args):
    """Print seconds from prompts to PNG files in memory: a student's one step, and in turn the reference pipeline's
    guided fifty of its teacher. Returns them."""
    StableDiffusionPipeline = need("diffusers").StableDiffusionPipeline
    device, dtype, batch = pick_device(args.device), PRECISION[args.precision], args.batch or 1
    teacher = load_teacher(args.teacher, device, dtype)
    if teacher.condition_type != "prompt":
        raise BadInput("--sampling is for teachers of text")
    w = train.default("guidance", args.teacher)
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
    prompts = training_prompts(teacher, None)[:batch]
    times = {name: [] for name in (*decoders, "fifty")}
    for k in range(-1, args.repeat):                        # the first round is not counted, and has no fifty
        for name, vae in decoders.items():
            student.teacher.vae = vae
            began = time.perf_counter()
            eps = noise(range(batch), teacher.shape).to(device)
            latents = student(eps, 0, **student.teacher.encode(prompts))
            images = [png(picture) for picture in to_pil(student.teacher.decode(latents))]
            times[name].append(time.perf_counter() - began)
        if k >= 0:
            began = time.perf_counter()
            images += [png(picture) for picture in pipeline(prompts, num_inference_steps=50, guidance_scale=w).images]
            times["fifty"].append(time.perf_counter() - began)
    fifty, found = times.pop("fifty"), {}
    print(f"{args.teacher}, {batch} at once in {args.precision} on {device}, prompts to PNG in memory, medians of "
          f"{args.repeat}: the pipeline's guided fifty {statistics.median(fifty):.4f} s")
    for name, values in times.items():
        found[name] = {"seconds": statistics.median(values[1:]),
                       "ratio": statistics.median(b / a for a, b in zip(values[1:], fifty))}
        print(f"  {name} {found[name]['seconds']:.4f} s, ratio {found[name]['ratio']:.1f}")
    return found


@torch.no_grad()
def bench_pictures(args):
    """Print images a second of sample.py's loop, from prompts to so many PNG files on disk, beside its bare networks,
    student and decoder on as many batches, in turn. Returns them."""
    device, batch = pick_device(args.device), args.batch or 16
    student, rows = load_student(device=device, dtype=PRECISION[args.precision]), []
    teacher, num = student.teacher, args.pictures
    prompts = training_prompts(teacher)
    jobs = list_jobs(1, [0], (prompts * (num // len(prompts) + 1))[:num], [student.guidance])
    options = argparse.Namespace(batch=batch, compare=[], refine=0, grid=False)
    eps, condition = noise(range(batch), teacher.shape).to(device), teacher.encode(prompts[:batch])
    for _ in range(args.repeat):
        began = time.perf_counter()
        for _ in range(-(-num // batch)):
            teacher.vae.decode(student(eps, 0, **condition))
        wait(device)
        bare, before = time.perf_counter() - began, system_memory("self/status", "VmRSS")
        with tempfile.TemporaryDirectory() as out:
            began = time.perf_counter()
            paint_jobs(student, options, jobs, {"student": "tiny"}, Path(out))
            whole = time.perf_counter() - began
            assert len(list(Path(out).glob("*.png"))) == num
        rows.append((num / whole, num / bare, bare / whole, system_memory("self/status", "VmRSS") - before))
    whole, bare, ratio, _ = (statistics.median(column) for column in zip(*rows))
    print(f"tiny's student, {num} pictures, {batch} at once in {args.precision} on {device}, medians of {args.repeat}: "
          f"sample.py {whole:.0f} images/s, its bare networks {bare:.0f}, ratio {ratio:.3f}; memory grew by "
          f"{rows[-1][-1] / 1e6:.0f} MB in the last")
    return {"images/s": whole, "bare": bare, "ratio": ratio, "growth": rows[-1][-1]}


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--teacher", default="tiny", help="its name, or its folder in the diffusers layout (default: tiny)")
    p.add_argument("--precision", choices=list(PRECISION), default="fp32")
    p.add_argument("--batch", type=int, help="(default: 1, of --step train.py's)")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    p.add_argument("--json", type=Path, help="write what was measured to this file, too")
    p.add_argument("--inner", help=argparse.SUPPRESS)
    option = p.add_argument_group("loading and passes").add_argument
    option("--parts", nargs="+", choices=list(PARTS), help="which networks (default: all there are)")
    option("--size", type=int, help="height and width of sample or latents (default: the config's)")
    option("--repeat", type=int, default=5)
    option("--compile", action="store_true", help="also time both under torch.compile")
    option = p.add_argument_group("pictures").add_argument
    option("--sampling", action="store_true", help="time one step and the reference pipeline's fifty, to PNG in memory")
    option("--decoder", help="with --sampling: the student's, as in sample.py")
    option("--pictures", type=int, metavar="NUM", help="time sample.py on so many of tiny, beside its networks")
    option = p.add_argument_group("training").add_argument
    option("--step", action="store_true", help="time whole steps")
    option("--alone", action="store_true", help="without the loop on diffusers")
    option("--steps", type=int, default=22, help="so many of BOOT, and as many matched ones (default: %(default)s)")
    option("options", nargs="*", help="after --, train.py's, such as -- --micro-batch 4")
    args = p.parse_args()
    if min(args.repeat, args.batch or 1, args.size or 1) < 1:
        p.error("--repeat, --batch and --size are 1 or more")
    if args.options and not args.step:
        p.error("options of train.py go with --step")
    device, dtype = pick_device(args.device), PRECISION[args.precision]
    inner = {"steps": measure_steps, "outside": functools.partial(measure_steps, clock=Clock(device)),
             "both": measure_both, "flops": count_flops}
    if args.inner in inner:
        return print(json.dumps(inner[args.inner](args)))
    folder, _ = resolve(args.teacher)
    folders = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    folders = {"unet": folder} | folders                    # the pixel models keep theirs at the root
    if args.inner:
        which, part = args.inner.split()
        return print(json.dumps(measure_loading(which, part, folders[part], device, dtype)))
    found = {}
    if args.step or args.sampling or args.pictures:
        found = (bench_steps if args.step else bench_sampling if args.sampling else bench_pictures)(args)
    else:
        for part in args.parts or folders:
            if part not in folders:
                raise BadInput(f"{args.teacher} has no {part}/")
            found[part] = bench(part, folders[part], args)
    if args.json:
        write_json(args.json, found)
    return None


if __name__ == "__main__":
    command(main)
