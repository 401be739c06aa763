"""Weights: strict loading of safetensors files. Pickles are refused.

    unet = load_module(UNet, folder / "unet", "cuda", torch.bfloat16)           # of config.json and one or more files
    network = build(UNet, config, tensors, where)                               # exactly these tensors, or BadInput
"""

import contextlib
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing.files import BadInput, parsing, read_json, write_file

STEM = "diffusion_pytorch_model"                            # the published name of U-Net and VAE weights
WEIGHTS = f"{STEM}.safetensors"
FLOAT32 = ("conv_norm_out.", "conv_out.")                   # the U-Net's last layers, see signal_ode.clean_prediction
REMEDIES = {                                    # what names of weights tell about how they were saved
    "_orig_mod.": "they were saved from a compiled module: save the module inside, ._orig_mod",
    "base_layer.": "a LoRA's layers are still in them: fuse_lora(), then unload_lora_weights(), then save_pretrained()",
    "lora_": "they are a LoRA, not a model: fuse it into the model, and save that"}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}      # before diffusers 0.12


@contextlib.contextmanager
def open_tensors(path):
    """safetensors' safe_open. What is wrong with the file is a BadInput."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        why = f"is not a whole safetensors file: {error}"
        if Path(path).is_file() and Path(path).stat().st_size < 1000 and b"git-lfs" in Path(path).read_bytes():
            why = "is a Git LFS pointer, not the weights: run `git lfs pull` there"
        raise BadInput(f"{path} {why}") from None


def write_tensors(path, tensors, dtype):
    """Write {name: tensor}, cast, with the metadata that diffusers and transformers ask for. Raises BadInput."""
    cast = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    write_file(path, lambda temporary: save_file(cast, temporary, {"format": "pt"}))


def weight_names(file):
    """The names of an open file's weights, without the position_ids that old text encoders store beside them."""
    return [name for name in file.keys() if not name.endswith("position_ids")]


def read_tensors(paths, device="cpu", dtype=None):
    """{name: tensor} of one safetensors file or several, on the device, in dtype (None: as stored).
    In half precision the layers named in FLOAT32 stay in float32. On the CPU, in the file's own dtype, a tensor is a
    view of the memory-mapped file, which costs no memory until it is read."""
    tensors = {}
    half = dtype in (torch.float16, torch.bfloat16)
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        with open_tensors(path) as file:
            names = weight_names(file)
        while names:
            with open_tensors(path) as file:    # reopened every 128 MB, to release the pages that were read of it
                copied = 0
                while names and copied < 2**27:
                    name = names.pop()
                    stored = file.get_tensor(name)
                    if not stored.is_floating_point():
                        raise BadInput(f"{path}: {name} is {stored.dtype}, but weights are floating-point")
                    tensors[name] = stored.to(device, torch.float32 if half and name.startswith(FLOAT32) else dtype)
                    if tensors[name] is not stored:
                        copied += stored.nbytes
    return tensors


def remap_key(name):
    """The name that our networks give to a published parameter: today's name in diffusers, if it has an old one."""
    if re.match(r"(embeddings|encoder\.layers\.\d+\.(layer_norm\d|self_attn|mlp)|final_layer_norm)\.", name):
        return f"text_model.{name}"                         # transformers 5 leaves the first part out
    if ".attentions." not in name:
        return name
    module, layer, kind = name.rsplit(".", 2)
    return f"{module}.{OLD_NAMES.get(layer, layer)}.{kind}"


def init_on_meta(network, config, where):
    """network(config) on the meta device, without weights. Raises BadInput that begins with `where`, a file's name."""
    with parsing(where), torch.device("meta"):
        return network(config)


def build(network, config, tensors, where):
    """network(config), frozen, made of exactly these tensors, which are not copied. Raises BadInput naming the
    config's key, or the missing, unexpected and mis-shaped tensors. `where`: the name of the file, for the message."""
    module = init_on_meta(network, config, where)
    tensors = {remap_key(name): tensor for name, tensor in tensors.items()}
    expected = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = [[f"missing {n}" for n in expected if n not in shapes],
             [f"unexpected {n}" for n in shapes if n not in expected],
             [f"{n} is {shapes[n]}, not {expected[n]}" for n in expected if shapes.get(n, expected[n]) != expected[n]]]
    if any(wrong):
        said = [text for kind in wrong for text in kind[:3] + [f"{len(kind) - 3} more"] * (len(kind) > 3)]
        remedy = next((f" ({REMEDIES[mark]})" for mark in REMEDIES if any(mark in name for name in tensors)), "")
        raise BadInput(f"{where} does not hold the weights its config describes{remedy}: {'; '.join(said)}")
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def choose_weights(names, stem, read):
    """The files that hold the weights called stem, out of these names. If there is an index of shards, it decides, as
    in diffusers. Else it is the whole file or its shards, else the same in fp16. `read`: callable (name of an index) ->
    its JSON. Raises ValueError if there are two sets and no index."""
    for variant in ("", ".fp16"):
        index, whole = f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors"
        if index in names:
            with parsing(index):
                listed = {str(Path(stem).parent / name) for name in read(index)["weight_map"].values()}
            return sorted(listed) or [f"{index} lists nothing"]
        shard = re.compile(rf"({re.escape(stem)}(?:{variant})?-)(\d+)(-of-(\d+)(?:{variant})?\.safetensors)")
        sets = {(match[1], match[3]): match for name in sorted(names) if (match := shard.fullmatch(name))}
        found = [whole] * (whole in names) + [match[0] for match in sets.values()]
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} are of two sets of weights: move one away")
        for match in sets.values():                         # all shards of this number, those that are missing too
            return [f"{match[1]}{k:0{len(match[2])}}{match[3]}" for k in range(1, int(match[4]) + 1)]
        if whole in names:
            return [whole]
    return []


def weight_files(folder, stem=STEM):
    """The safetensors files of a folder that hold its weights, one or several shards. Raises BadInput."""
    names = [path.name for path in folder.glob("*")]
    with parsing(folder):
        files = choose_weights(names, stem, lambda index: read_json(folder / index))
    for name in [name for name in files if not (folder / name).exists()]:
        raise BadInput(f"{folder / name} is missing, or a link that leads nowhere: download it again")
    if not files:
        others = [name for name in names if name.endswith((".safetensors", ".bin", ".ckpt", ".pt", ".pth"))]
        said = (f", and there is only {', '.join(others)}: a pickle can run code and is refused, another variant "
                "has to be renamed or saved without `variant`") * bool(others)
        raise BadInput(f"{folder / stem}.safetensors is missing{said}")
    return [folder / name for name in files]


def load_module(network, folder, device, dtype, stem=STEM):
    """A network, frozen, from its folder of config.json and weights. Raises BadInput."""
    config, files = read_json(folder / "config.json"), weight_files(folder, stem)
    return build(network, config, read_tensors(files, device, dtype), files[0])


@contextlib.contextmanager
def visiting(module, device):
    """Move a module to the device for as long as it is needed, if it rests elsewhere. The weights where it rests
    are kept, so nothing is copied back."""
    home = {p: p.data for p in module.parameters()}
    try:
        yield module.to(device)
    finally:
        for p, data in home.items():
            p.data = data
