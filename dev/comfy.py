"""Does an exported student make sample.py's picture in ComfyUI? It is started here, without a screen.

    python -m dev.comfy ~/ComfyUI --student runs/sd21
    python -m dev.comfy ~/ComfyUI --student runs/sd21 --python ~/ComfyUI/venv/bin/python
    python -m dev.comfy ~/ComfyUI --student runs/lora --lora full

The student, of a Stable Diffusion, is exported as one file with its workflow; with --lora RANK also as a LoRA, which
ComfyUI then adds to the teacher. ComfyUI computes each workflow on the CPU, for the prompt and seed given. One should
see the largest difference of the two pictures, of 255, and ComfyUI's version. It takes a few minutes, with --lora a
quarter of an hour, and four times the student's size on disk. The folder of ComfyUI is not changed.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing.files import BadInput, command, new_parser, read_json, user_path, user_spec
from plumbing.hub import ROOT
from plumbing.weights import write_tensors
from student import load_student
from tools.export import LORA
from tools.single_file import single_file

PATIENCE = 900          # seconds for ComfyUI to start, and for it to make the picture


def run_tool(*args):
    """Run one of our commands; raises BadInput if it fails."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise BadInput(f"{' '.join(map(str, args))}: {done.stderr.strip()}")


def ask(address, path, content=None):
    """The answer of ComfyUI's server: JSON, or the bytes of a picture."""
    data = None if content is None else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(f"{address}/{path}", data, timeout=60) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        raise BadInput(f"ComfyUI refuses {path}: {error.read().decode()[:2000]}") from None
    return body if path.startswith("view") else json.loads(body)


def wait_for(what, server, log):
    """What a function returns, as soon as it is something and ComfyUI answers. Raises BadInput."""
    end = time.time() + PATIENCE
    while time.time() < end and server.poll() is None:
        try:
            if found := what():
                return found
        except OSError:                                     # it does not listen yet
            pass
        time.sleep(1)
    raise BadInput(f"ComfyUI does not answer: {log.read_text()[-2000:]}")


def paint(args, folder, workflow):
    """The picture that ComfyUI makes by a workflow with the files in folder/base, (H, W, 3), and its version."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", folder / "comfyui.txt"
    line = [args.python, "main.py", "--cpu", "--force-fp32", "--port", str(port), "--base-directory",
            str(folder / "base"), "--disable-auto-launch", "--disable-all-custom-nodes"]
    with open(log, "w") as file:
        server = subprocess.Popen(line, cwd=args.comfyui, stdout=file, stderr=file)
    try:
        about = wait_for(lambda: ask(address, "system_stats"), server, log)
        number = ask(address, "prompt", {"prompt": workflow})["prompt_id"]
        history = wait_for(lambda: ask(address, f"history/{number}").get(number), server, log)
        if not (images := [image for node in history["outputs"].values() for image in node.get("images", [])]):
            raise BadInput(f"ComfyUI has made no picture: {json.dumps(history['status'])[:2000]}")
        query = urllib.parse.urlencode({key: images[0][key] for key in ("filename", "subfolder", "type")})
        path = folder / "theirs.png"
        path.write_bytes(ask(address, f"view?{query}"))
        return np.asarray(Image.open(path).convert("RGB")).astype(int), about["system"]["comfyui_version"]
    finally:
        server.kill()
        server.wait()


def place_files(args, folder):
    """Export the student to folder/exported, and put its file, its LoRA and the teacher where ComfyUI looks for them,
    in folder/base."""
    models = folder / "base" / "models"
    for name in ("models/checkpoints", "models/loras", "user", "input", "output", "temp"):
        (folder / "base" / name).mkdir(parents=True, exist_ok=True)
    lora = ["--lora", args.lora] if args.lora else []
    run_tool("-m", "tools.export", "--student", args.student, "--out", folder / "exported", "--single-file", *lora)
    for path in (folder / "exported").glob("*.safetensors"):
        path.rename(models / ("loras" if path.name == LORA else "checkpoints") / path.name)
    if args.lora:
        teacher = load_student(args.student, device="cpu").teacher
        tensors = single_file(teacher.unet.state_dict(), teacher.vae.state_dict(), teacher.text_encoder.state_dict(),
                              read_json(teacher.unet_folder / "config.json"))
        write_tensors(models / "checkpoints" / "the_teacher.safetensors", tensors, torch.float32)


def fill_in(workflow, prompt, seed):
    """Write prompt and seed into a workflow."""
    texts = [node for node in workflow.values() if node["class_type"] == "CLIPTextEncode"]
    next(node for node in texts if node["inputs"]["text"])["inputs"]["text"] = prompt
    for node in workflow.values():
        if "noise_seed" in node["inputs"]:
            node["inputs"]["noise_seed"] = seed


def main():
    p = new_parser(__doc__)
    p.add_argument("comfyui", type=user_path, help="folder of ComfyUI, with its main.py")
    p.add_argument("--student", type=user_spec, required=True, help="what train.py wrote, of a Stable Diffusion")
    p.add_argument("--lora", metavar="RANK", help="of tools.export: try the student as a LoRA as well")
    p.add_argument("--python", default=sys.executable, help="that runs ComfyUI (default: this one)")
    p.add_argument("--prompt", default="a raccoon in a space suit")
    p.add_argument("--seed", type=int, default=7)
    args = p.parse_args()
    if not (args.comfyui / "main.py").exists():
        raise BadInput(f"{args.comfyui} has no main.py: give the folder of ComfyUI")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        place_files(args, folder)
        run_tool("sample.py", "--student", args.student, "--prompt", args.prompt, "--seed", args.seed,
                 "--device", "cpu", "--out", folder / "ours.png")
        ours = np.asarray(Image.open(folder / "ours.png")).astype(int)
        for path in sorted((folder / "exported").glob("workflow*.json")):
            workflow = read_json(path)
            fill_in(workflow, args.prompt, args.seed)
            theirs, version = paint(args, folder, workflow)
            if theirs.shape != ours.shape:
                raise BadInput(f"ComfyUI's picture is of {theirs.shape}, and not of {ours.shape}")
            error = abs(theirs - ours)
            print(f"ComfyUI {version}, {path.name}: its picture differs from sample.py's by {error.max()} of 255 at "
                  f"most, {(error**2).mean() ** 0.5:.2f} RMS; the picture's own deviation is {ours.std():.0f}",
                  flush=True)


if __name__ == "__main__":
    command(main)
