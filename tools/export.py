"""A student for other programs: a folder that diffusers opens, a LoRA, one file in Stable Diffusion's original names.

    python -m tools.export --student runs/sd21 --out exported/sd21                      teacher's architecture and keys
    python -m tools.export --student runs/sd21 --out exported/sd21 --precision fp16 --single-file --lora 64
    python -m tools.export --student runs/range --out exported/range                    guidance stays an input
    python -m tools.export --student runs/range --out exported/range5 --guidance 5      one scale, folded in
    python -m tools.export --student runs/sd21 --out exported/sd21 --onnx               also one graph, noise to pixels
    python -m tools.export --student runs/sd21 --out exported/sd21 --push USER/NAME

Other programs have no input for a target time, and no fixed input time. The target time is the constant 0 here, so its
embedding folds into the bias of time_embedding.linear_2; a guidance scale folds in the same way. The exported schedule
ends at the input time, so one step with trailing spacing begins there. README.md in the folder says how to use it.
"""

import copy
import json
import re
import shlex
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, hf_hub_download

from model import UNet, guidance_sinusoid
from plumbing.configs import read_schedule, target_slot
from plumbing.files import (BadInput, check_new, command, new_parser, read_json, read_text, user_path, user_spec,
                            write_file, write_json)
from plumbing.hub import HUB, SMALL, TINY, find, is_embedded
from plumbing.images import noise
from plumbing.layout import EXPORTED, part_folder
from plumbing.processes import PRECISION
from plumbing.prompts import training_prompts
from plumbing.weights import WEIGHTS, build, write_tensors
from signal_ode import clean_prediction
from student import load_student
from tools.evaluate import usual_place
from tools.graph import write_graph
from tools.single_file import single_file

LORA = "pytorch_lora_weights.safetensors"       # what load_lora_weights looks for
COMPARED = 4                                    # images of which the error of a LoRA is taken
VERSION = "0.30.0"                              # of diffusers, whose layout the folder has
NEITHER = {"feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
           "safety_checker": [None, None]}      # what a StableDiffusionPipeline may also have


# ------------------------------------------------------------------------------------------------------- folding
@torch.no_grad()
def fold(network, w=None):
    """{name: tensor} of a student's network at target time 0, float32. The layers that a teacher lacks are folded into
    others: the embedding of the target time, a LoRA's additions and, if a scale w is given, the embedding of guidance.
    For every input the network's output is the same up to rounding. If guidance stays an input, this code leaves some
    of its features out, and other programs do not. So these features get weights of zero."""
    tensors = {name: tensor.detach().float().cpu() for name, tensor in network.state_dict().items()}
    for name in [name.removesuffix(".up.weight") for name in tensors if name.endswith(".up.weight")]:
        up, down = (tensors.pop(f"{name}.{part}.weight").flatten(1) for part in ("up", "down"))
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + (up @ down).view_as(tensors[f"{name}.weight"])
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


def truncate_schedule(config, i):
    """The scheduler's config for one Euler step from time i, at which its schedule ends."""
    betas, prediction = read_schedule(config)
    kept = {"trained_betas": betas[:i].tolist(), "prediction_type": prediction}
    if i == len(betas):                                     # the whole schedule: say it as the teacher does
        keys = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "trained_betas", "rescale_betas_zero_snr")
        kept = {key: config[key] for key in keys if config.get(key) is not None}
    return {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": VERSION, "num_train_timesteps": i,
            "timestep_spacing": "trailing", "steps_offset": 1, **kept}


def from_unit_noise(tensors, schedule, i, clip, kind):
    """(tensors, scheduler's config) for pipelines that start from eps itself instead of sigma_i * eps.
    The first convolution is multiplied by sigma_i. An epsilon student's sample is (eps - out) * sigma_i / alpha_i. Take
    a scheduler whose alpha_bar at i is a = (alpha_i / sigma_i)^2. From eps and an output out' it makes the sample
    (eps - sqrt(1 - a) * out') / sqrt(a). The two are equal if out' = out / sqrt(1 - a), so the last convolution is
    divided by that. A v student's sample is alpha_i * sigma_i * eps - sigma_i * out, with a = (alpha_i * sigma_i)^2.
    Raises BadInput."""
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
    beta = 1 - signal ** (2 / i)                            # i such steps have alpha_bar = a together
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
    """(up (M, rank), down (rank, N)): up @ down is the best approximation of a matrix (M, N) by this rank. Ranks that
    the matrix lacks are zeros. Singular vectors are eigenvectors of the smaller of D D^T and D^T D."""
    tall = difference.shape[0] > difference.shape[1]
    D = (difference.T if tall else difference).double()
    squares, vectors = torch.linalg.eigh(D @ D.T)                                               # ascending
    squares, vectors = squares.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    root = squares.sqrt().sqrt().clamp(min=1e-12)           # both factors get the same share of a singular value
    missing = rank - len(root)
    a = F.pad(vectors * root, (0, missing))
    b = F.pad((vectors.T @ D) / root[:, None], (0, 0, 0, missing))
    return (b.T.float(), a.T.float()) if tall else (a.float(), b.float())


def embedded_time(tensors, student):
    """silu(emb) (c_emb,), which is what the resnets get of the input time, by a network's tensors."""
    part = {name.removeprefix("time_embedding."): p.double() for name, p in tensors.items() if "time_embedding" in name}
    index = torch.tensor([student.teacher.schedule.timestep(student.input_time)])
    sinusoid = student.network.sinusoid(index)[0].double()                                      # (c_0,)
    hidden = F.silu(part["linear_1.weight"] @ sinusoid + part["linear_1.bias"])
    return F.silu(part["linear_2.weight"] @ hidden + part["linear_2.bias"])


@torch.no_grad()
def rank_of_lora(student, rank):
    """The rank that a LoRA gets: the one asked for, but not more than the full one. `rank`: 0 asks for the full one."""
    full = student.network.settings["lora_rank"]
    full = full or max(min(p.shape[0], p[0].numel()) for p in student.teacher.unet.parameters() if p.ndim > 1)
    return min(rank or full, full)


def make_lora(tensors, student, rank, dtype=torch.float32):
    """(lora, made), both {name: tensor}: a LoRA for the teacher's network, and the weights that result from it. At full
    rank they make the student's images. `tensors`: the student's, folded. `rank`: of all matrices, because programs
    disagree about LoRAs with several ranks; 0 is the full one. Of a student that is a LoRA its own rank is the full
    one, and its additions are written as they are. `dtype`: of the file.
    Programs look for layers in resnets, attentions and samplers, and not all of them elsewhere. So the time's embedding
    stays the teacher's, and what it lacks goes to the resnets' time_emb_proj. The input time is fixed, so each of these
    gets one vector: h from the teacher's embedding, h' from the student's. A change of rank one makes W h into W' h'.
    The first and last layer are the teacher's, but in students of before 2026-12; then they are part of the LoRA."""
    teacher, lora, made = student.teacher, {}, {}
    base = {name: tensor.float().cpu() for name, tensor in teacher.unet.state_dict().items()}
    trained, rank = student.network.own_parameters(), rank_of_lora(student, rank)
    trained_as_lora = rank == student.network.settings["lora_rank"]
    theirs, ours = embedded_time(base, student), embedded_time(tensors, student)                # h, h'
    for name, weight in base.items():
        made[name] = weight
        if weight.ndim < 2 or name.startswith("time_embedding."):
            continue
        difference = (tensors[name] - weight).flatten(1)
        if "time_emb_proj" in name:
            change = tensors[name].double() @ ours - weight.double() @ theirs
            difference = torch.outer(change, theirs) / theirs.square().sum()
        elif not difference.any():
            continue
        module, factors = name.removesuffix(".weight"), None
        if trained_as_lora and "time_emb_proj" not in name:
            factors = [trained[f"{module}.{part}.weight"].detach().float().cpu().flatten(1) for part in ("up", "down")]
        up, down = (factor.to(dtype).float() for factor in factors or low_rank(difference, rank))
        made[name] = weight + (up @ down).view_as(weight)
        key = f"lora_unet_{module.replace('.', '_')}"
        lora[f"{key}.lora_down.weight"] = down.view(rank, *weight.shape[1:])
        lora[f"{key}.lora_up.weight"] = up.view(*up.shape, *[1] * (weight.ndim - 2))
    return lora, made


@torch.no_grad()
def lora_error(tensors, made, student):
    """How much the images of a LoRA differ from the student's: (RMS, maximum) over the pixels of a few, in 1/255.
    `tensors`, `made`: {name: tensor} of the student and of the LoRA, in the teacher's architecture."""
    teacher, i = student.teacher, student.input_time
    prompts, images = training_prompts(teacher), []
    for weights in (tensors, made):
        network = build(UNet, read_json(teacher.unet_folder / "config.json"), weights, LORA).to(teacher.device)
        for k in range(COMPARED):                           # one image at a time, to spare memory
            x = (teacher.schedule.sigma(i) * noise([k], teacher.shape)).float().to(teacher.device)
            t = torch.tensor([i], device=teacher.device)
            condition = teacher.encode([prompts[k * len(prompts) // COMPARED]])
            out = network(x, teacher.schedule.timestep(t), **condition)
            images.append(teacher.decode(clean_prediction(out, x, t, teacher.schedule)) * 127.5)
    error = torch.cat(images[:COMPARED]) - torch.cat(images[COMPARED:])
    return error.square().mean().sqrt().item(), error.abs().max().item()


# ------------------------------------------------------------------------------------------------------- writing
def save_text_parts(out, teacher, vae_folder, dtype):
    """Write vae/, text_encoder/ and tokenizer/; returns their lines of model_index.json."""
    vae = read_json(vae_folder / "config.json")
    write_tensors(out / "vae" / WEIGHTS, teacher.vae.state_dict(), dtype)
    write_tensors(out / "text_encoder" / "model.safetensors", teacher.text_encoder.state_dict(), dtype)
    write_json(out / "vae" / "config.json", vae)
    write_json(out / "text_encoder" / "config.json", read_json(teacher.folder / "text_encoder" / "config.json"))
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for path in (teacher.folder / "tokenizer").iterdir():
        if path.name in SMALL:
            shutil.copyfile(path, out / "tokenizer" / path.name)
    return NEITHER | {"vae": ["diffusers", vae["_class_name"]], "text_encoder": ["transformers", "CLIPTextModel"],
                      "tokenizer": ["transformers", "CLIPTokenizer"]}


def export(student, args):
    """Write the student to the folder args.out. Returns (pipeline, error): the pipeline that opens the folder and the
    LoRA's error, or None for either. From now on the student's teacher decodes by --decoder. Raises BadInput before
    anything is written."""
    teacher, i, out, dtype = student.teacher, student.input_time, args.out, PRECISION[args.precision]
    config = read_json(teacher.unet_folder / "config.json")
    tensors, files, error = fold(student.network, args.guidance), {}, None
    if not teacher.text_encoder:
        pipeline = None if teacher.labels else "DDIMPipeline"           # no pipeline has a UNet2DModel of classes
        unet, scheduler = from_unit_noise(tensors, teacher.schedule, i, teacher.clip, "DDIMScheduler")
    elif student.ranged and args.guidance is None:
        pipeline = "LatentConsistencyModelPipeline"
        unet, scheduler = from_unit_noise(tensors, teacher.schedule, i, teacher.clip, "LCMScheduler")
        config["time_cond_proj_dim"] = student.network.config["time_cond_proj_dim"]
    else:
        pipeline, unet = "StableDiffusionPipeline", tensors
        scheduler = truncate_schedule(read_json(part_folder(teacher.folder, "scheduler") / "scheduler_config.json"), i)
    if args.single_file and f"{out.resolve().name}.safetensors" == LORA:
        raise BadInput(f"--out {out}: the single file would have the name of the LoRA, {LORA}: give another name")
    if args.single_file:                                                # with the teacher's own VAE
        files[f"{out.resolve().name}.safetensors"] = single_file(
            tensors, teacher.vae.state_dict(), teacher.text_encoder.state_dict(), config)
    vae_folder = teacher.folder / "vae"
    if args.decoder:
        vae_folder, _ = find(args.decoder)
        teacher.use_decoder(args.decoder)
    if args.lora is not None:
        files[LORA], made = make_lora(tensors, student, args.lora, dtype)
        error = lora_error(tensors, made, student)

    if args.onnx:                                                       # first, since it may lack a package
        write_graph(out / "student.onnx", student, tensors, half=args.precision == "fp16")
    write_tensors(out / "unet" / WEIGHTS, unet, dtype)
    write_json(out / "unet" / "config.json", config)
    write_json(out / "scheduler" / "scheduler_config.json", {**scheduler, EXPORTED: teacher.spec})
    for name, content in files.items():
        write_tensors(out / name, content, dtype)
        lora = name == LORA
        write_json(out / ("workflow_lora.json" if lora else "workflow.json"),
                   workflow(student, "the_teacher.safetensors" if lora else name, LORA if lora else None))
    parts = {"unet": ["diffusers", config["_class_name"]], "scheduler": ["diffusers", scheduler["_class_name"]]}
    if teacher.text_encoder:
        parts |= save_text_parts(out, teacher, vae_folder, dtype)
    if pipeline:
        write_json(out / "model_index.json", {"_class_name": pipeline, "_diffusers_version": VERSION, **parts})
    return pipeline, error


# ------------------------------------------------------------------------------------------------ workflows, card
def image_size(teacher):
    """(height, width) of a teacher's images, in pixels."""
    levels = len(read_json(teacher.folder / "vae" / "config.json")["block_out_channels"]) if teacher.vae else 1
    return [side * 2 ** (levels - 1) for side in teacher.shape[1:]]


def sigma_max(student):
    """The noise level at which a student's step begins, as other programs measure it: noise over signal."""
    return min(student.teacher.schedule.lam(student.input_time).exp().item(), 4096)             # diffusers' infinity


def workflow(student, checkpoint, lora=None):
    """A ComfyUI workflow in its API format, for a checkpoint and, if there is one, a LoRA of the teacher."""
    nodes, teacher = read_json(Path(__file__).parent / "workflow.json"), student.teacher
    height, width = image_size(teacher)
    changes = {"1": {"ckpt_name": checkpoint}, "3": {"text": training_prompts(teacher)[0]},
               "2": {"sampling": {"epsilon": "eps", "sample": "x0"}.get(teacher.schedule.prediction, "v_prediction")},
               "5": {"width": width, "height": height}, "7": {"sigma_max": sigma_max(student)}}
    if lora:
        changes["2"]["model"] = ["11", 0]
        nodes["11"] = {"class_type": "LoraLoaderModelOnly", "inputs": {
            "model": ["1", 0], "lora_name": lora, "strength_model": 1.0}}
    for number, inputs in changes.items():
        nodes[number]["inputs"] |= inputs
    return nodes


def card(student, args, pipeline, error):
    """The text of an exported folder's README.md: the sections of card.md that apply to it, filled in."""
    teacher, w, kind = student.teacher, student.pick_guidance(args.guidance), pipeline or "no pipeline"
    base, _, revision = teacher.spec.partition("@")
    base = HUB[base]["repositories"][0] if base in HUB else base
    lo, hi = student.guidance if student.ranged else (w, w)
    height, width = image_size(teacher)
    rms, most = error or (0.0, 0.0)
    tag = "text-to-image" if teacher.text_encoder else "unconditional-image-generation"
    words = {
        "name": args.out.resolve().name, "teacher": teacher.spec, "w": w, "lo": lo, "hi": hi,
        "pipeline_tag": f"\npipeline_tag: {tag}" if pipeline else "",
        "where": quoted(args.push or args.out.as_posix()), "prompt": quoted(training_prompts(teacher)[0]),
        "base": quoted(teacher.folder if is_embedded(base) else base)
                + f", revision={quoted(revision)}" * bool(revision),
        "dtype": "torch.float16" if args.precision == "fp16" else "torch.float32",
        "to": ".to(torch.float16)" * (args.precision == "fp16"), "height": height, "width": width,
        "shape": ", ".join(map(str, teacher.shape)), "lora": LORA, "rms": rms, "most": most,
        "rank": f"rank {rank_of_lora(student, args.lora)}" if args.lora else "the full rank",
        "predicts": {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[teacher.schedule.prediction],
        "sigma": sigma_max(student),
        "classes": ", ".join(f"{number} {name}" for name, number in teacher.labels.items() if name),
        "negative": quoted(teacher.negative_prompt) if teacher.negative_prompt else "it is empty",
        "onnx_inputs": onnx_inputs(student, args),
        "graph": quoted("student.onnx" if args.push else (args.out / "student.onnx").as_posix()),
        "figures": figures(args, teacher, student.fingerprint, w)}
    applies = {"seed": pipeline, "lora": error, "single file": args.single_file, "onnx": args.onnx,
               "programs": error or args.single_file, "limits": True,
               f"limits of {kind}": True, "limits of prompts": teacher.text_encoder, "figures": True}
    _, *parts = re.split(r"<!-- (.+) -->\n", (Path(__file__).parent / "card.md").read_text(encoding="utf-8"))
    sections = dict(zip(parts[::2], parts[1::2]))
    chosen = ["head", kind, *(name for name, whether in applies.items() if whether and name in sections)]
    return "".join(sections[name] for name in chosen).format(**words)


def onnx_inputs(student, args):
    """The lines of Python that make the other inputs of student.onnx than eps."""
    lines, text, where = [], quoted(training_prompts(student.teacher)[0]), args.push or args.out.as_posix()
    if student.teacher.text_encoder:
        lines += ["from transformers import CLIPTokenizer",
                  f'tokenizer = CLIPTokenizer.from_pretrained({quoted(where)}, subfolder="tokenizer")',
                  f'inputs["tokens"] = tokenizer([{text}], padding="max_length", truncation=True, '
                  'return_tensors="np").input_ids']
    if student.teacher.labels:
        lines.append('inputs["label"] = np.array([0])')
    if student.ranged and args.guidance is None:
        lines.append(f'inputs["guidance"] = np.array([{student.pick_guidance()}], dtype=np.float32)')
    return "\n".join(lines)


def figures(args, teacher, fingerprint, w):
    """A table of the student's rows and of the teacher's fifty steps, if tools.evaluate has left one for this scale and
    decoder in its usual place."""
    found = read_json(usual_place(args.student, teacher), default={})
    if [found.get(key) for key in ("weights", "guidance", "decoder")] != [fingerprint, w, args.decoder]:
        return "There was no evaluation.json of this student beside it: `python -m tools.evaluate` makes one."
    keys = ("frechet", "precision", "recall", "align_seen", "align_heldout")
    lines = [f"Measured on {found['images']} images.\n", f"| sampler | passes | {' | '.join(keys)} |"]
    lines.append("|---|---|" + "---|" * len(keys))
    for row in found["rows"]:
        if row["sampler"] == "student" or row["steps"] == 50:
            limited = ", limited" if row.get("limited") else ""
            name = f"{row['sampler']}, {row['steps']}, w = {row['guidance']:g}{limited}"
            values = " | ".join("–" if row[key] is None else f"{row[key]:.3g}" for key in keys)
            lines.append(f"| {name} | {row['nfe']} | {values} |")
    return "\n".join(lines)


def quoted(text):
    """A text as Python and JSON write it, for a line of code."""
    return json.dumps(str(text), ensure_ascii=False)


def push(folder, repo, private):
    """Upload a folder to the hub, as a commit. Raises BadInput, also for a repository with files of somebody else's."""
    try:
        HfApi().create_repo(repo, exist_ok=True, private=private)
        there = set(HfApi().list_repo_files(repo)) - {".gitattributes", "README.md"}        # which new ones may have
        ours = "scheduler/scheduler_config.json"            # which says so, if tools.export wrote it
        if there and (ours not in there or EXPORTED not in read_text(hf_hub_download(repo, ours))):
            raise BadInput(f"{repo} has files that tools.export did not write, and is left alone: give a new name")
        info = HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="One-step student, by BOOT")
    except BadInput:
        raise
    except Exception as error:                              # the client raises whatever its HTTP library does
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = "log in with `hf auth login`, by a token that may write there, or set HF_TOKEN"
        raise BadInput(f"{repo} can't be written ({why if status in (401, 403) else error}); "
                       f"{folder} is whole: `hf upload {repo} {shlex.quote(str(folder))}` tries again") from None
    print(info.commit_url)


def rank(text):
    """The rank of --lora; 0 for the full one."""
    if text != "full" and not (text.isdecimal() and int(text) > 0):
        raise BadInput(f"--lora {text} is neither a rank, such as 64, nor full")
    return 0 if text == "full" else int(text)


def parse_args():
    p = new_parser(__doc__)
    p.add_argument("--student", type=user_spec, default=TINY / "student",
                   help="what train.py wrote (default: the shipped one)")
    p.add_argument("--teacher", type=user_spec, help="its teacher's folder, if that has moved since the training")
    p.add_argument("--out", type=user_path, required=True, help="a new folder")
    p.add_argument("--guidance", type=float, help="the scale w to fold into a student of a range; without it the scale "
                   "stays an input")
    p.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="(default: %(default)s)")
    p.add_argument("--decoder", type=user_spec, help="folder or hub id of an AutoencoderTiny, to stand in vae/")
    p.add_argument("--lora", type=rank, metavar="RANK", help=f"also write {LORA}: for each weight of the teacher, its "
                   "change as a matrix of this rank; `full` for all of it, in a file larger than the model unless the "
                   "student is a LoRA")
    p.add_argument("--single-file", action="store_true", help="also write all in one file, under the original names")
    p.add_argument("--onnx", action="store_true", help="also write student.onnx, a graph from noise and token ids to "
                   "pixels, see tools/graph.py; its weights are stored in --precision")
    p.add_argument("--push", metavar="USER/NAME", help="upload the folder to the hub")
    p.add_argument("--private", action="store_true", help="with --push: for nobody else, if it is a new repository")
    args = p.parse_args()
    if args.private and not args.push:
        p.error("--private goes with --push")
    return args


def main():
    args = parse_args()
    student = load_student(args.student, args.teacher)
    text, extra = student.teacher.text_encoder, args.lora is not None or args.single_file
    if args.guidance is not None:
        student.pick_guidance(args.guidance)
    check_new(args.out)
    if extra and not text:
        raise BadInput("--lora and --single-file are for students of Stable Diffusion")
    if student.ranged and args.guidance is None and (extra or not text):
        raise BadInput(f"--lora, --single-file and pipelines of pixels carry one scale: give --guidance, "
                       f"{student.guidance[0]} to {student.guidance[1]}")
    pipeline, error = export(student, args)
    content = card(student, args, pipeline, error)
    write_file(args.out / "README.md", lambda path: path.write_text(content, encoding="utf-8"))
    print(f"{args.out}: README.md there says how it is used")
    if error:
        print(f"  {LORA}: its images differ from the student's by {error[0]:.2g} of 255 (RMS; {error[1]:.0f} at most)")
    if args.push:
        push(args.out, args.push, args.private)


if __name__ == "__main__":
    command(main)
