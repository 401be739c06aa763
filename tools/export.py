"""A student for other programs: a folder that diffusers opens, a LoRA, one file in Stable Diffusion's original names.

    python -m tools.export --student runs/sd21 --out exported/sd21                      teacher's architecture and keys
    python -m tools.export --student runs/sd21 --out exported/sd21 --precision fp16 --single-file --lora 64
    python -m tools.export --student runs/range --out exported/range                    guidance stays an input
    python -m tools.export --student runs/range --out exported/range5 --guidance 5      one scale, folded in
    python -m tools.export --student runs/sd21 --out exported/sd21 --push USER/NAME

Such programs know no target time and no input time. The first is a constant, 0, so that its embedding folds into the
bias of time_embedding.linear_2, and a guidance scale folds likewise; the second is where the exported schedule ends,
so that one step with trailing spacing begins there. README.md in the folder says how it is used.
"""

import argparse
import copy
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from safetensors.torch import save_file

from plumbing.files import BadInput, command, read_json, write_file, write_json
from plumbing.hub import HUB, TINY, find, is_embedded
from plumbing.weights import WEIGHTS, build
from model import UNet, guidance_sinusoid
from plumbing.configs import target_slot
from plumbing.configs import read_schedule
from signal_ode import clean_prediction
from student import load_student
from plumbing.images import noise
from plumbing.layout import part_folder
from plumbing.processes import PRECISION
from plumbing.prompts import training_prompts
from tools.single_file import single_file

LORA = "pytorch_lora_weights.safetensors"       # what load_lora_weights looks for
COMPARED = 4                                    # pictures of which the error of a LoRA is taken
VERSION = "0.30.0"                              # of diffusers, whose layout the folder has
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "tokenizer.json")
NEITHER = {"feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
           "safety_checker": [None, None]}      # what a StableDiffusionPipeline may also have


# ------------------------------------------------------------------------------------------------------- folding
@torch.no_grad()
def fold(network, w=None):
    """{name: tensor} of a student's network at target time 0, float32, without what a teacher has not: the embedding of
    the target time, and with w, a scale, that of guidance. Equal, but for rounding, for every input. Where guidance
    stays an input, features of it that are left out here have zeros as weights, as others know of no such rule."""
    tensors = {name: tensor.detach().float().cpu() for name, tensor in network.state_dict().items()}
    slot, time = f"{target_slot(network.settings)}_embedding", network.time_embedding
    target = copy.deepcopy(network.get_submodule(slot)).cpu().double()
    at_0 = target(network.sinusoid(torch.zeros(1)).double())[0]                                 # (c_emb,)
    tensors["time_embedding.linear_2.bias"] = (time.linear_2.bias.double().cpu() + at_0).float()
    if time.cond_proj is not None:
        projection, fastest = time.cond_proj.weight.double().cpu(), network.settings["time_cond_fastest"]
        features = guidance_sinusoid(torch.tensor([w or 0.0]), projection.shape[1], fastest)[0].double()     # (c_w,)
        if w is None:
            tensors["time_embedding.cond_proj.weight"] = (projection * (features != 0)).float()         # (c_0, c_w)
        else:
            del tensors["time_embedding.cond_proj.weight"]
            change = time.linear_1.weight.double().cpu() @ projection @ features                        # (c_emb,)
            tensors["time_embedding.linear_1.bias"] = (time.linear_1.bias.double().cpu() + change).float()
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{slot}.")}


def cut(config, schedule, i):
    """The scheduler's config for one Euler step from time i, which is where its schedule ends."""
    cosine, zero_snr = config.get("beta_schedule") == "squaredcos_cap_v2", config.get("rescale_betas_zero_snr")
    kept = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "trained_betas",
                                         "rescale_betas_zero_snr") if config.get(key) is not None}
    if i < schedule.T and not (cosine or zero_snr or "trained_betas" in kept):
        kept["beta_end"] = read_schedule(config, schedule.T)[schedule.timestep(i)].item()
    elif i < schedule.T:
        alpha_bar = schedule.alpha(torch.arange(i + 1)) ** 2
        kept |= {"trained_betas": (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist(), "rescale_betas_zero_snr": False}
    return {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": VERSION, "num_train_timesteps": i,
            "timestep_spacing": "trailing", "steps_offset": 1, **kept}


def from_unit_noise(tensors, schedule, i, clip, kind):
    """A network's tensors, and the scheduler's config, for pipelines that start from eps itself and know no scale: the
    first convolution multiplies by sigma_i. An epsilon student's picture is (eps - out) sigma_i / alpha_i. A scheduler
    with a = (alpha_i / sigma_i)^2 as its signal rate makes (eps - sqrt(1 - a) out') / sqrt(a) of eps and an out',
    the same if the last convolution is multiplied so that out' = out / sqrt(1 - a). Likewise for v, with
    a = (alpha_i sigma_i)^2: alpha_i sigma_i eps - sigma_i out, and sqrt(a) eps - sqrt(1 - a) out'. Raises BadInput."""
    alpha, sigma = schedule.alpha(i).item(), schedule.sigma(i).item()
    if schedule.prediction == "epsilon":
        signal, factor = alpha / sigma, 1.0
    else:
        signal, factor = alpha * sigma, sigma
    if signal >= 1:
        raise BadInput(f"with an input time of {i}, of more signal than noise, no pipeline carries the student")
    gain = 1.0 if schedule.prediction == "sample" else factor / (1 - signal**2) ** 0.5
    tensors = dict(tensors)
    tensors["conv_in.weight"] = (tensors["conv_in.weight"].double() * sigma).float()
    for name in ("conv_out.weight", "conv_out.bias"):
        tensors[name] = (tensors[name].double() * gain).float()
    beta = 1 - signal ** (2 / i)                            # in each of i steps, which are a together
    config = {"_class_name": kind, "_diffusers_version": VERSION, "num_train_timesteps": i, "beta_schedule": "linear",
              "beta_start": beta, "beta_end": beta, "prediction_type": schedule.prediction, "set_alpha_to_one": True,
              "timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": clip is not None}
    if clip is not None:
        config["clip_sample_range"] = clip
    if kind == "LCMScheduler":
        config["original_inference_steps"] = 1
    return tensors, config


# ---------------------------------------------------------------------------------------------------------- LoRA
def low_rank(difference, rank):
    """(up, down) of the best approximation up @ down of a matrix (M, N) by one of this rank: (M, rank) and
    (rank, N), filled up with zeros. Singular vectors are eigenvectors of the smaller of D D^T and D^T D."""
    tall = difference.shape[0] > difference.shape[1]
    D = (difference.T if tall else difference).double()
    squares, vectors = torch.linalg.eigh(D @ D.T)                                               # ascending
    squares, vectors = squares.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    root = squares.sqrt().sqrt().clamp(min=1e-12)           # both get the same share of a singular value
    a, b = vectors * root, (vectors.T @ D) / root[:, None]
    missing = rank - len(root)
    a = torch.cat([a, a.new_zeros(len(a), missing)], 1)
    b = torch.cat([b, b.new_zeros(missing, b.shape[1])])
    return (b.T.float(), a.T.float()) if tall else (a.float(), b.float())


def time_embedding(tensors, student):
    """(hidden layer (c_emb,), embedding (c_emb,)) of the input time, by a network's tensors."""
    part = {name.removeprefix("time_embedding."): p.double() for name, p in tensors.items() if "time_embedding" in name}
    index = torch.tensor([student.teacher.schedule.timestep(student.input_time)])
    sinusoid = student.network.sinusoid(index)[0].double()                                      # (c_0,)
    hidden = F.silu(part["linear_1.weight"] @ sinusoid + part["linear_1.bias"])
    return hidden, part["linear_2.weight"] @ hidden + part["linear_2.bias"]


@torch.no_grad()
def make_lora(tensors, student, rank, dtype=torch.float32):
    """({name: tensor} of a LoRA that makes the teacher's network the student's, {name: tensor} of the weights that it
    makes of the teacher's). tensors: the student's, folded. rank: 0 for the full one; all matrices have the same, as
    readers disagree about others. dtype: of the file."""
    teacher, lora, made = student.teacher, {}, {}
    own = {name: tensor.float().cpu() for name, tensor in teacher.unet.state_dict().items()}
    whole = max(min(p.shape[0], p[0].numel()) for p in own.values() if p.ndim > 1)
    rank = min(rank or whole, whole)
    # The times are fixed, so that the time's embedding is one vector, and a change of it a product of two.
    _, student_embedding = time_embedding(tensors, student)
    hidden, teacher_embedding = time_embedding(own, student)
    change = torch.outer(student_embedding - teacher_embedding, hidden) / hidden.square().sum()
    for name, weight in own.items():
        made[name] = weight
        module = name.removesuffix(".weight")
        if weight.ndim < 2 or module == "time_embedding.linear_1":
            continue
        difference = change if module == "time_embedding.linear_2" else (tensors[name] - weight).flatten(1)
        up, down = (factor.to(dtype).float() for factor in low_rank(difference, rank))
        made[name] = weight + (up @ down).view_as(weight)
        key = f"lora_unet_{module.replace('.', '_')}"
        lora[f"{key}.lora_down.weight"] = down.view(rank, *weight.shape[1:])
        lora[f"{key}.lora_up.weight"] = up.view(*up.shape, *[1] * (weight.ndim - 2))
    return lora, made


@torch.no_grad()
def lora_error(tensors, made, student):
    """(RMS, maximum) over the pixels of a few pictures, in 255ths: how far those of the network with these weights are
    from the student's. tensors, made: {name: tensor} of both in the teacher's architecture."""
    teacher, i = student.teacher, student.input_time
    prompts = training_prompts(teacher)
    eps = noise(range(COMPARED), teacher.shape).to(teacher.device)
    condition = teacher.encode([prompts[k * len(prompts) // COMPARED] for k in range(COMPARED)])
    x, t = teacher.schedule.sigma(i) * eps, torch.full((COMPARED,), i, device=teacher.device)
    images = []
    for weights in (tensors, made):
        network = build(UNet, read_json(teacher.unet_folder / "config.json"), weights, LORA).to(teacher.device)
        out = network(x.float(), teacher.schedule.timestep(t), **condition)
        images.append(teacher.decode(clean_prediction(out, x, t, teacher.schedule)) * 127.5)
    error = images[0] - images[1]
    return error.square().mean().sqrt().item(), error.abs().max().item()


# ------------------------------------------------------------------------------------------------------- writing
def save(path, tensors, dtype):
    """Write tensors, cast, with the metadata that diffusers and transformers ask for."""
    cast = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    write_file(path, lambda p: save_file(cast, p, {"format": "pt"}))


def save_text_parts(out, teacher, vae_folder, dtype):
    """Write vae/, text_encoder/ and tokenizer/; returns their lines of model_index.json."""
    vae = read_json(vae_folder / "config.json")
    save(out / "vae" / WEIGHTS, teacher.vae.state_dict(), dtype)
    save(out / "text_encoder" / "model.safetensors", teacher.text_encoder.state_dict(), dtype)
    write_json(out / "vae" / "config.json", vae)
    write_json(out / "text_encoder" / "config.json", read_json(teacher.folder / "text_encoder" / "config.json"))
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for path in (teacher.folder / "tokenizer").iterdir():
        if path.name in TOKENIZER:
            shutil.copyfile(path, out / "tokenizer" / path.name)
    return NEITHER | {"vae": ["diffusers", vae["_class_name"]], "text_encoder": ["transformers", "CLIPTextModel"],
                      "tokenizer": ["transformers", "CLIPTokenizer"]}


def export(student, out, w=None, dtype=torch.float32, decoder=None, lora=None, name=None):
    """Write the student to a folder, as said at the top of this file. w: the scale that is folded into a ranged one;
    None: it stays an input. decoder: the student's teacher decodes by it from now on. lora: the rank of a file beside,
    0 for the full one. name: of a single file beside. Returns the pipeline that opens the folder, or None, and the
    LoRA's error or None. Raises BadInput, before anything is written."""
    teacher, i = student.teacher, student.input_time
    is_open = student.ranged and w is None
    config = read_json(teacher.unet_folder / "config.json")
    tensors, files, error = fold(student.network, w if student.ranged else None), {}, None
    if not teacher.text_encoder:
        pipeline = None if teacher.labels else "DDIMPipeline"           # no pipeline has a UNet2DModel of classes
        unet, scheduler = from_unit_noise(tensors, teacher.schedule, i, teacher.clip, "DDIMScheduler")
    elif is_open:
        pipeline = "LatentConsistencyModelPipeline"
        unet, scheduler = from_unit_noise(tensors, teacher.schedule, i, teacher.clip, "LCMScheduler")
        config["time_cond_proj_dim"] = student.network.config["time_cond_proj_dim"]
    else:
        pipeline = "StableDiffusionPipeline"
        path = part_folder(teacher.folder, "scheduler") / "scheduler_config.json"
        unet, scheduler = tensors, cut(read_json(path), teacher.schedule, i)
    if name:                                                            # of the teacher's own VAE
        texts = teacher.text_encoder.state_dict()
        files[f"{name}.safetensors"] = single_file(tensors, teacher.vae.state_dict(), texts, config)
    vae_folder = teacher.folder / "vae"
    if decoder:
        vae_folder, _ = find(decoder)
        teacher.use_decoder(decoder)
    if lora is not None:
        files[LORA], made = make_lora(tensors, student, lora, dtype)
        error = lora_error(tensors, made, student)

    save(out / "unet" / WEIGHTS, unet, dtype)
    write_json(out / "unet" / "config.json", config)
    write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    for file, content in files.items():
        save(out / file, content, dtype)
    parts = {"unet": ["diffusers", config["_class_name"]], "scheduler": ["diffusers", scheduler["_class_name"]]}
    if teacher.text_encoder:
        parts |= save_text_parts(out, teacher, vae_folder, dtype)
    if pipeline:
        write_json(out / "model_index.json", {"_class_name": pipeline, "_diffusers_version": VERSION, **parts})
    return pipeline, error


# ---------------------------------------------------------------------------------------------------------- card
USE = {                                                     # by the pipeline that carries it, None if there is none
    "StableDiffusionPipeline": """\
pipe = StableDiffusionPipeline.from_pretrained({where}, torch_dtype={dtype})
image = pipe({prompt}, num_inference_steps=1, guidance_scale=1.0).images[0]""",
    "LatentConsistencyModelPipeline": """\
pipe = LatentConsistencyModelPipeline.from_pretrained({where}, torch_dtype={dtype})
image = pipe({prompt}, num_inference_steps=1, guidance_scale={w}).images[0]""",
    "DDIMPipeline": """\
pipe = DDIMPipeline.from_pretrained({where}, torch_dtype={dtype})
image = pipe(num_inference_steps=1).images[0]""",
    None: """\
unet = UNet2DModel.from_pretrained({where}, subfolder="unet", torch_dtype={dtype})
scheduler = DDIMScheduler.from_pretrained({where}, subfolder="scheduler")
scheduler.set_timesteps(1)
eps, t = torch.randn(1, {shape}, dtype={dtype}), scheduler.timesteps[0]
with torch.no_grad():
    out = unet(eps, t, class_labels=torch.tensor([{label}])).sample
image = scheduler.step(out, t, eps).prev_sample             # (1, {shape}), from -1 to 1"""}
USE_LORA = """
## As a LoRA

`{lora}` has each weight's change, to {rank}, under names that diffusers, ComfyUI and
AUTOMATIC1111 read. Beside the student itself its pictures are {rms:.2g} of 255 off (RMS; {most:.0f} at most).

```python
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained({base}, torch_dtype={dtype})
pipe.scheduler = EulerDiscreteScheduler.from_pretrained({where}, subfolder="scheduler")
pipe.load_lora_weights({where}, weight_name="{lora}")
image = pipe({prompt}, num_inference_steps=1, guidance_scale=1.0).images[0]
```
"""
USE_FILE = """
## In ComfyUI and the like

`{file}` is the whole model under the original names.

- ComfyUI: `models/checkpoints`{lora}. `SamplerCustom` with `KSamplerSelect` euler, `ManualSigmas` "{sigma:.4f}, 0"
  and cfg 1.0; `ModelSamplingDiscrete` {predicts} before it, as ComfyUI else guesses that from the weights.
- AUTOMATIC1111, Forge: `models/Stable-diffusion`. Sampler Euler, schedule type Karras, 1 step, CFG scale 1 and, in the
  settings of the samplers, a "sigma max" of {sigma:.4f}.
"""


def figures(folder, teacher, w, decoder):
    """The student's rows at this scale and with this decoder and that of the teacher's fifty steps, as a table, if
    tools.evaluate has left them in its usual place."""
    places = [folder, folder.parent]
    if TINY in folder.resolve().parents:
        places = [Path("runs") / f"{Path(teacher.spec).name}-shipped"]
    path = next((place / "evaluation.json" for place in places if (place / "evaluation.json").exists()), None)
    if path is None or read_json(path)["guidance"] != w or read_json(path).get("decoder") != decoder:
        return "No evaluation.json of it lay beside the student: `python -m tools.evaluate` makes one."
    keys = ("frechet", "precision", "recall", "align_seen", "align_heldout")
    lines = ["| sampler | passes | " + " | ".join(keys) + " |", "|---|---|" + "---|" * len(keys)]
    for row in read_json(path)["rows"]:
        if row["sampler"] == "student" or row["steps"] == 50:
            values = " | ".join("–" if row[key] is None else f"{row[key]:.3g}" for key in keys)
            lines.append(f"| {row['sampler']}, {row['steps']} | {row['nfe']} | {values} |")
    return "\n".join(lines)


def quoted(text):
    """A text as Python and JSON write it, for a line of code."""
    return json.dumps(str(text), ensure_ascii=False)


def card(student, args, folder, pipeline, error):
    """README.md of an exported folder: what it is, how it is used, what it can't do, its figures."""
    teacher, i, name = student.teacher, student.input_time, args.out.resolve().name
    base = HUB[teacher.spec]["repositories"][0] if teacher.spec in HUB else teacher.spec
    base = teacher.folder if is_embedded(base) else base
    w = student.pick_guidance(args.guidance)
    words = {"where": quoted(args.push or args.out.as_posix()), "prompt": quoted(training_prompts(teacher)[0]),
             "dtype": "torch.float16" if args.precision == "fp16" else "torch.float32", "base": quoted(base),
             "w": f"{w:g}", "shape": ", ".join(map(str, teacher.shape)), "label": 0, "lora": LORA,
             "file": f"{name}.safetensors", "rank": f"rank {args.lora}" if args.lora else "the full rank",
             "sigma": min(teacher.schedule.lam(i).exp().item(), 4096)}      # which is infinity in diffusers
    imports = pipeline or "DDIMScheduler, UNet2DModel"
    lines = ["---", "library_name: diffusers", "tags: [boot, one-step, distillation]"]
    if pipeline:
        lines += [f"pipeline_tag: {'text-to-image' if teacher.text_encoder else 'unconditional-image-generation'}"]
    lines += ["---", "", f"# {name}", "", f"A student of {teacher.spec} that paints in one pass of the network, "
              "distilled by BOOT ([2306.05544](https://arxiv.org/abs/2306.05544)) without any image.", "", "```python",
              "import torch", f"from diffusers import {imports}", "", USE[pipeline].format(**words), "```", ""]
    if pipeline == "LatentConsistencyModelPipeline":
        lo, hi = student.guidance
        limits = [f"`guidance_scale` is w, from {lo:g} to {hi:g}: the network is told it, and makes one pass. "
                  "`StableDiffusionPipeline` opens the folder as well, and takes the same arguments."]
    elif pipeline == "StableDiffusionPipeline":
        limits = [f"The guidance scale {w:g} is built in: `guidance_scale` is 1.0, so that the pipeline adds none."]
    else:
        names = ", ".join(f"{number} {name}" for name, number in teacher.labels.items() if name)
        limits = [f"The classes are {names}."] if names else []
    if teacher.condition_type == "prompt":
        what = f" (it was {teacher.negative_prompt!r})" if teacher.negative_prompt else ""
        limits.append(f"A negative prompt acts in training only{what}: here it has no effect.")
    limits += ["One step, with the scheduler that is here; it was trained for nothing else.",
               "The licence is that of its teacher."]
    if teacher.condition_type != "label":
        lines.append("With `generator=torch.Generator().manual_seed(N)` it is the picture of BOOT's sample.py of seed N"
                     f"{' to 1 of 255' if args.precision == 'fp16' else ''}.")
    if error:
        lines.append(USE_LORA.format(rms=error[0], most=error[1], **words))
    if args.single_file:
        predicts = teacher.schedule.prediction.replace("epsilon", "eps")
        words["lora"] = f", or the teacher's there and `{LORA}` into `models/loras`" if error else ""
        lines.append(USE_FILE.format(predicts=predicts, **words))
    lines += ["", "## Limits", "", *(f"- {limit}" for limit in limits), "", "## Figures", ""]
    return "\n".join([*lines, figures(folder, teacher, w, args.decoder), ""])


def push(folder, repo, private):
    """Upload a folder to the hub, as a commit. Raises BadInput."""
    try:
        HfApi().create_repo(repo, exist_ok=True, private=private)
        info = HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="One-step student, by BOOT")
    except Exception as error:                              # the client raises whatever its HTTP library does
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = "log in with `hf auth login`, by a token that may write there, or set HF_TOKEN"
        raise BadInput(f"{repo} can't be written ({why if status in (401, 403) else error}); "
                       f"{folder} is whole, and the same upload is `hf upload {repo} {folder}`") from None
    print(info.commit_url)


def rank(text):
    """The rank of --lora; 0 for the full one."""
    if text != "full" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"--lora {text} is neither a rank, such as 64, nor full")
    return 0 if text == "full" else int(text)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--student", default=TINY / "student", help="what train.py wrote (default: the shipped one)")
    p.add_argument("--teacher", help="its teacher's folder, if that has moved since the training")
    p.add_argument("--out", type=Path, required=True, help="a new folder")
    p.add_argument("--guidance", type=float, help="the scale w to fold into a student of a range; without it the scale "
                   "stays an input")
    p.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="(default: %(default)s)")
    p.add_argument("--decoder", help="folder or hub id of an AutoencoderTiny, to stand in vae/")
    p.add_argument("--lora", type=rank, metavar="RANK", help=f"also {LORA}, the change of the teacher's weights by a "
                   "matrix of this rank for each; `full` for all of it, in a file larger than the model")
    p.add_argument("--single-file", action="store_true", help="also all in one file, under the original names")
    p.add_argument("--push", metavar="USER/NAME", help="upload the folder to the hub")
    p.add_argument("--private", action="store_true", help="with --push: for nobody else, if it is a new repository")
    args = p.parse_args()
    if args.private and not args.push:
        p.error("--private goes with --push")
    student = load_student(args.student, args.teacher)
    folder, _ = find(args.student)
    teacher, extra = student.teacher, args.lora is not None or args.single_file
    if args.guidance is not None:
        student.pick_guidance(args.guidance)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise BadInput(f"--out {args.out} is not empty: give a new folder, or delete it")
    if student.ranged and args.guidance is None and not teacher.text_encoder:
        raise BadInput(f"a pixel model's pipeline knows no scale: give --guidance, {student.guidance[0]} to "
                       f"{student.guidance[1]}")
    if extra and not teacher.text_encoder:
        raise BadInput("--lora and --single-file are for students of Stable Diffusion")
    if extra and student.ranged and args.guidance is None:
        raise BadInput(f"--lora and --single-file carry one scale: give --guidance, {student.guidance[0]} to "
                       f"{student.guidance[1]}")
    name = args.out.resolve().name if args.single_file else None
    pipeline, error = export(student, args.out, args.guidance, PRECISION[args.precision], args.decoder, args.lora, name)
    text = card(student, args, folder, pipeline, error)
    write_file(args.out / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
    print(f"{args.out}: README.md there says how it is used")
    if error:
        print(f"  {LORA}: its pictures are {error[0]:.2g} of 255 off (RMS; {error[1]:.0f} at most)")
    if args.push:
        push(args.out, args.push, args.private)


if __name__ == "__main__":
    command(main)
