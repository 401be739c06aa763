"""A model's folder in the diffusers layout: which parts it has, and what their configs say.

    betas, prediction, clip = read_scheduler(folder)
    config = read_unet(folder)                              # values of the U-Net's config, and its sample_size
"""

import hashlib

import torch

from plumbing.configs import CLIPPING, COUNT, Number, check, is_pixel, read_config, read_schedule, read_unet_config
from plumbing.files import BadInput, parsing, read_json
from plumbing.weights import open_tensors, remap_key, weight_names

EXPORTED = "_student_of"        # the key of a scheduler's config that tools.export writes; diffusers ignores such keys
# The accepted classes of each part of a model. None skips the check: either the part's own config is checked, or the
# part is not used.
CLASSES = {
    "unet": ("UNet2DConditionModel", "UNet2DModel"), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "scheduler": None, "safety_checker": None,
    "feature_extractor": None, "image_encoder": None}


def part_folder(folder, part):
    """The folder of a model's part. Pixel models may keep all of their parts in one folder."""
    own, config = folder / part, folder / ("config.json" if part == "unet" else f"{part}_config.json")
    exists = own.is_dir() or ((folder / "model_index.json").exists() and not config.exists())
    return own if exists else folder


def read_parts(folder):
    """{part: class} that a model's model_index.json lists. Without that file, the parts are the model's folders, and
    their classes are unknown. Raises BadInput for a part that this code has no use for."""
    path = folder / "model_index.json"
    if not path.exists():
        return {name: None for name in (*CLASSES, "vqvae") if (folder / name).is_dir()}
    lists = {name: value for name, value in read_json(path).items()
             if isinstance(value, list) and any(value) and not name.startswith("_")}
    with parsing(path):
        for name, value in lists.items():
            check(name, value, f"no other parts than {', '.join(CLASSES)}", name in CLASSES)
            if CLASSES[name]:
                check(name, value, ", ".join(CLASSES[name]), value[-1] in CLASSES[name])
    return {name: value[-1] for name, value in lists.items()}


def read_scheduler(folder):
    """(betas, prediction type, clip) of a model's scheduler: clean predictions lie within [-clip, clip], or clip is
    None. Raises BadInput."""
    path = part_folder(folder, "scheduler") / "scheduler_config.json"
    if not path.exists():
        student = any(folder.glob("student.json")) or any(folder.glob("student/student.json"))
        found = "a student, not a teacher" if student else "no model in the diffusers layout"
        raise BadInput(f"{folder} holds {found}: there is no {path.relative_to(folder)}")
    config = read_json(path)
    if EXPORTED in config:
        raise BadInput(f"{folder} is a student that tools.export wrote, not a teacher: that is {config[EXPORTED]}")
    with parsing(path):
        # If a config omits clip_sample, the DDPM and DDIM schedulers clip and the others don't.
        clips = config.get("_class_name") in ("DDPMScheduler", "DDIMScheduler")
        c = read_config({"clip_sample": clips, **config}, CLIPPING)
        return *read_schedule(config), c["clip_sample_range"] if c["clip_sample"] else None


def read_unet(folder):
    """{key: value} of the config of a model's U-Net, with sample_size as [h, w]. Raises BadInput for one that is not a
    teacher's."""
    path, parts = part_folder(folder, "unet") / "config.json", read_parts(folder)
    config = read_json(path)
    with parsing(path):
        c = read_unet_config(config)
        pixel, kind, size = is_pixel(config), parts.get("unet"), config.get("sample_size")
        sizes = size if isinstance(size, list) else [size, size]
        check("_class_name", c["_class_name"], f"{kind}, which model_index.json says", kind in (None, c["_class_name"]))
        check("in_channels", c["in_channels"], [3] if pixel else [COUNT])
        check("out_channels", c["out_channels"], [c["in_channels"]])
        check("sample_size", size, "a whole number, or a list of height and width", len(sizes) == 2)
        for pixels in sizes:
            check("sample_size", pixels, [Number(int, 1, 2**14)])
        check("num_class_embeds", c["num_class_embeds"], [None, COUNT] if pixel else [None])
        if pixel and ("vae" in parts or "vqvae" in parts):
            raise ValueError("a UNet2DModel on latents is not supported: on pixels, without a VAE")
        if c["class_embed_type"] or c["target_embed_type"] or c["time_cond_proj_dim"] or c["lora_rank"]:
            raise ValueError("with class_embed_type or time_cond_proj_dim it is a student, not a teacher")
    return c | {"sample_size": sizes}


def read_labels(folder, num):
    """{name: number} of num classes. model_index.json may name them by id2label, as DiT's does; "" is no class."""
    path = folder / "model_index.json"
    names, labels = read_json(path, default={}).get("id2label") or {}, {}
    with parsing(path):
        good = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
        check("id2label", names, 'names by number, {"0": "cat", ...}', good)
    for k in range(num):
        name = names.get(str(k), str(k))
        labels[f"{name} ({k})" if name in labels else name] = k     # ImageNet has two classes named crane
    return labels


def fingerprint(paths, schedule, about):
    """A short hash of a schedule, of `about`, and of the first weights of every tensor in some files. Files in half
    precision have the same one."""
    alphas = schedule.alpha(torch.arange(schedule.T + 1)).mul(1e6).round().tolist()
    digest = hashlib.sha256(f"{schedule.prediction} {about} {alphas}".encode())
    some = {}
    for path in paths:
        with open_tensors(path) as file:
            some |= {remap_key(name): file.get_tensor(name).flatten()[:8].half() for name in weight_names(file)}
    for name in sorted(some):
        digest.update(name.encode() + some[name].numpy().tobytes())
    return digest.hexdigest()[:16]
