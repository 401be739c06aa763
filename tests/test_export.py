"""What tools.export writes, in the reference library's stock pipelines: the same pictures as sample.py's."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from plumbing.files import read_json, write_json
from plumbing.hub import TINY
from plumbing.weights import WEIGHTS
from conftest import CHECKPOINTS
from model import UNet
from signal_ode import Schedule
from student import load_student, new_student, save_student
from teacher import load_teacher
from tools.export import cut

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
diffusers.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

PROMPTS = ["a red ankle boot on a yellow background", "a blue bag on a white background"]
UNET = f"unet/{WEIGHTS}"


def random_student(folder, family, guidance=3.0):
    """A student with random weights of a small teacher with a published model's config and schedule. The teacher is in
    folder/teacher; its text encoder and VAE are tiny's."""
    config = read_json(CHECKPOINTS / family / "unet" / "config.json")
    scheduler = read_json(CHECKPOINTS / family / "scheduler" / "scheduler_config.json")
    config |= {"block_out_channels": [c // 8 for c in config["block_out_channels"]], "norm_num_groups": 8,
               "sample_size": 8}
    if "cross_attention_dim" in config:
        config["cross_attention_dim"] = 64
        skip = shutil.ignore_patterns("unet", "student", "pixel", "judge", "evaluation", "decoder", "scheduler")
        shutil.copytree(TINY, folder / "teacher", ignore=skip)
    else:
        guidance = 1.0
    write_json(folder / "teacher" / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "teacher" / "unet" / "config.json", config)
    torch.manual_seed(0)
    save_file(shaken(UNet(config)).state_dict(), folder / "teacher" / UNET)
    teacher = load_teacher(folder / "teacher")
    T = teacher.schedule.T
    student = new_student(teacher, T if teacher.schedule.prediction == "v_prediction" else round(0.6 * T), guidance)
    shaken(student.network)
    save_student(folder / "student", student)
    return folder / "student"


@torch.no_grad()
def shaken(network):
    """Every matrix changed at random, but those of what starts at zero only in the way in which training changes them:
    guidance by its slow features."""
    for name, p in network.named_parameters():
        if p.ndim > 1 and "cond_proj" not in name:
            p += 0.3 * torch.randn_like(p) / p[0].numel() ** 0.5
        elif "cond_proj" in name:
            p[:, 100:128] += 0.1 * torch.randn_like(p[:, 100:128])
    return network


def sampled(call, out, student, *options):
    """sample.py's pictures of seeds 0 and 1."""
    code, _, error = call("sample", "--student", student, *options, "--out", out)
    assert code == 0, error
    return pixels([Image.open(path) for path in sorted(out.glob("*.png"))])


def exported(call, out, student, *options):
    code, printed, error = call("tools.export", "--student", student, "--out", out, *options)
    assert code == 0, error
    return printed


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def painted(pipeline, **arguments):
    """A pipeline's one step from the noises of seeds 0 and 1."""
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pixels(pipeline(num_inference_steps=1, generator=generator, **arguments).images)


def text_options(prompts=PROMPTS):
    return [part for prompt in prompts for part in ("--prompt", prompt)]


@pytest.fixture(scope="module", params=["tiny", "sd21-base", "sd21-768-v", "sd15"])
def fixed(request, tmp_path_factory):
    if request.param == "tiny":
        return TINY / "student"
    return random_student(tmp_path_factory.mktemp(request.param), request.param)


def test_the_folded_student_is_the_teachers_network_and_paints_the_same(call, tmp_path, fixed):
    exported(call, tmp_path / "x", fixed)
    expected = sampled(call, tmp_path / "own", fixed, *text_options())
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "x")
    assert abs(painted(pipeline, prompt=PROMPTS, guidance_scale=1.0) - expected).max() <= 1
    teacher = load_student(fixed).teacher.folder
    theirs, ours = load_file(teacher / UNET), load_file(tmp_path / "x" / UNET)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert read_json(tmp_path / "x" / "unet" / "config.json") == read_json(teacher / "unet" / "config.json")


@pytest.mark.parametrize("change", [
    {}, {"beta_schedule": "linear", "prediction_type": "v_prediction"}, {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.001 + 0.0001 * k for k in range(100)], "num_train_timesteps": 100},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}])
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_the_schedule_ends_at_the_input_time_for_any_betas(change, share):
    config = read_json(TINY / "scheduler" / "scheduler_config.json") | change
    schedule = Schedule(config)
    i = round(share * schedule.T)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(cut(config, schedule, i))
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [schedule.timestep(i)]
    if schedule.alpha(i) > 0:
        assert scheduler.sigmas[0].item() == pytest.approx((schedule.sigma(i) / schedule.alpha(i)).item(), rel=1e-4)


def test_the_lora_of_full_rank_makes_the_teacher_the_student(call, tmp_path, fixed):
    pytest.importorskip("peft")
    printed = exported(call, tmp_path / "x", fixed, "--lora", "full")
    assert "; 0 at most" in printed
    expected = sampled(call, tmp_path / "own", fixed, *text_options())
    teacher = load_student(fixed).teacher.folder
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "x", subfolder="scheduler")
    pipeline.load_lora_weights(tmp_path / "x", weight_name="pytorch_lora_weights.safetensors")
    assert abs(painted(pipeline, prompt=PROMPTS, guidance_scale=1.0) - expected).max() <= 1


def test_a_lora_of_low_rank_says_how_far_off_it_is(call, tmp_path):
    said = [exported(call, tmp_path / rank, TINY / "student", "--lora", rank) for rank in ("1", "16", "64")]
    errors = [float(text.split("pictures are ")[1].split()[0]) for text in said]
    assert errors == sorted(errors, reverse=True) and errors[0] > 3 and errors[2] < errors[0] / 2
    assert f"{errors[2]:.2g} of 255 off" in (tmp_path / "64" / "README.md").read_text()


def test_a_range_of_guidance_stays_an_input_of_both_pipelines_or_is_folded(call, tmp_path):
    student = random_student(tmp_path, "sd21-base", [2.0, 8.0])
    exported(call, tmp_path / "x", student)
    exported(call, tmp_path / "x5", student, "--guidance", 5)
    for w in (2.0, 5.0, 8.0):
        expected = sampled(call, tmp_path / f"own{w}", student, *text_options(), "--guidance", w)
        for kind in (diffusers.LatentConsistencyModelPipeline, diffusers.StableDiffusionPipeline):
            pipeline = kind.from_pretrained(tmp_path / "x")
            assert abs(painted(pipeline, prompt=PROMPTS, guidance_scale=w) - expected).max() <= 1
    five = sampled(call, tmp_path / "five", student, *text_options(), "--guidance", 5)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "x5")
    assert abs(painted(pipeline, prompt=PROMPTS, guidance_scale=1.0) - five).max() <= 1
    assert abs(five - expected).max() > 10                  # that of 8


def test_an_unconditional_pixel_student_opens_as_a_ddim_pipeline(call, tmp_path):
    student = random_student(tmp_path, "ddpm-cifar10-32")
    exported(call, tmp_path / "x", student)
    expected = sampled(call, tmp_path / "own", student, "--num", 2)
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "x")
    assert abs(painted(pipeline, batch_size=2) - expected).max() <= 1


def test_the_card_of_a_class_student_says_how_it_is_used(call, tmp_path):
    """No pipeline has classes of pixels: its own lines are run."""
    exported(call, tmp_path / "x", TINY / "pixel")
    expected = sampled(call, tmp_path / "own", TINY / "pixel", "--label", "t-shirt")
    code = (tmp_path / "x" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    image = ((names["image"][0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).int().numpy()
    assert abs(image - expected[0]).max() <= 1


def test_half_precision_and_the_small_decoder_are_carried_along(call, tmp_path):
    exported(call, tmp_path / "x", TINY / "student", "--precision", "fp16", "--decoder", TINY / "decoder")
    assert {tensor.dtype for tensor in load_file(tmp_path / "x" / UNET).values()} == {torch.float16}
    expected = sampled(call, tmp_path / "own", TINY / "student", *text_options(), "--decoder", TINY / "decoder")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "x", torch_dtype=torch.float32)
    assert type(pipeline.vae) is diffusers.AutoencoderTiny
    error = abs(painted(pipeline, prompt=PROMPTS, guidance_scale=1.0) - expected)
    assert (error**2).mean() ** 0.5 < 1                     # of 255: rounding of the weights


def test_the_single_file_opens_as_the_original_does(call, tmp_path):
    exported(call, tmp_path / "x", TINY / "student", "--single-file")
    configs = shutil.copytree(tmp_path / "x", tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    pipeline = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "x" / "x.safetensors"), config=str(configs), local_files_only=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "x", subfolder="scheduler")
    expected = sampled(call, tmp_path / "own", TINY / "student", *text_options())
    assert abs(painted(pipeline, prompt=PROMPTS, guidance_scale=1.0) - expected).max() <= 1


class Hub(BaseHTTPRequestHandler):
    """What of the hub an upload needs, where files go into the commit itself. .files: {path: bytes} of its commits."""
    protocol_version, files, visibility, allowed = "HTTP/1.1", {}, [], True

    def log_message(self, *_):
        pass

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        """The request's, which may come in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self):
        lines = [json.loads(line) for line in self.body().splitlines()]
        if not self.allowed:
            return self.answer(403, {"error": "no"})
        if self.path == "/api/repos/create":
            self.visibility.append(lines[0].get("visibility"))
            return self.answer(200, {"url": f"http://127.0.0.1/{lines[0]['organization']}/{lines[0]['name']}"})
        if "/preupload/" in self.path:
            return self.answer(200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                               for file in lines[0]["files"]]})
        if "/commit/" in self.path:
            self.files |= {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                           for line in lines if line["key"] == "file"}
            return self.answer(200, {"commitUrl": "http://127.0.0.1/me/boot/commit/c", "commitOid": "c" * 40})
        return self.answer(200, {})                         # the card's front matter is asked about

    def do_GET(self):
        self.answer(404, {})


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import HfApi
    api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_x")
    monkeypatch.setattr("tools.export.HfApi", lambda: api)
    Hub.files, Hub.visibility, Hub.allowed = {}, [], True
    yield Hub
    server.shutdown()
    server.server_close()


def test_an_export_is_pushed_to_the_hub_whole(call, tmp_path, hub):
    printed = exported(call, tmp_path / "x", TINY / "student", "--push", "me/boot", "--private")
    written = {str(path.relative_to(tmp_path / "x")): path.read_bytes()
               for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert hub.files == written and hub.visibility == ["private"] and "me/boot/commit" in printed
    assert 'from_pretrained("me/boot"' in hub.files["README.md"].decode()


def test_a_push_that_is_refused_leaves_the_folder_and_says_what_to_do(call, tmp_path, hub):
    hub.allowed = False
    code, _, error = call("tools.export", "--out", tmp_path / "x", "--push", "me/boot")
    assert code == 2 and "log in with `hf auth login`" in error and (tmp_path / "x" / "README.md").exists()


@pytest.mark.parametrize("options, message", [
    (("--student", TINY / "pixel", "--lora", 8), "--lora and --single-file are for students of Stable Diffusion"),
    (("--lora", "0"), "--lora 0 is neither a rank"), (("--guidance", 7), "--guidance 7.0 is not supported"),
    (("--decoder", TINY / "vae"), "AutoencoderKL")])
def test_what_can_not_be_exported_is_one_sentence(call, tmp_path, options, message):
    code, _, error = call("tools.export", *options, "--out", tmp_path / "x")
    assert code == 2 and message in error and "Traceback" not in error


def test_an_export_overwrites_nothing(call, tmp_path):
    (tmp_path / "mine.txt").touch()
    code, _, error = call("tools.export", "--out", tmp_path)
    assert code == 2 and "is not empty" in error
