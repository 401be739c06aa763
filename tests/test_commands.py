"""Whole commands on the embedded teacher, as a person runs them: train, kill, resume, sample, evaluate, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT
from teacher import TINY

SHORT = ["train.py", "--batch", 8, "--steps", 6, "--save-every", 2, "--sample-every", 6, "--warmup", 2]
PROMPT = "a red ankle boot on a yellow background"


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The folder of a finished short run, to compare with."""
    out = tmp_path_factory.mktemp("run")
    done = run(*SHORT, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def student(out):
    return load_file(out / "student" / "diffusion_pytorch_model.safetensors")


def assert_bitwise_equal(a, b):
    a, b = student(a), student(b)
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_training_leaves_everything_and_says_where(trained):
    out, done = trained
    assert f"python sample.py --student {out}" in done.stdout and f"python -m tools.evaluate --student {out}" in done.stdout
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "samples", "student", "state"}
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6 and last["bootstrap"] > 0 and last["boundary"] > 0
    assert Image.open(out / "samples" / "step_6.png").size == (8 * 32, 2 * 32)
    before = load_file(TINY / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].float()
    assert not student(out)["conv_in.weight"].equal(before)


def test_two_runs_are_bitwise_equal(run, trained, tmp_path):
    assert run(*SHORT, "--out", tmp_path).returncode == 0
    assert_bitwise_equal(tmp_path, trained[0])


def start(*args):
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def test_killed_run_resumes_bitwise(run, trained, tmp_path):
    process = start(*SHORT, "--out", tmp_path)
    wait_for(tmp_path / "state" / "state.safetensors", process)
    process.kill()                                                          # -9: no handler runs
    process.wait()
    done = run(*SHORT, "--out", tmp_path)
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stderr
    assert_bitwise_equal(tmp_path, trained[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_saves_at_the_next_step(run, trained, tmp_path, number):
    process = start(*SHORT, "--out", tmp_path, "--save-every", 1000)
    wait_for(tmp_path / "config.json", process)
    time.sleep(0.5)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 0 and (tmp_path / "state" / "state.safetensors").exists(), output
    assert run(*SHORT, "--out", tmp_path, "--save-every", 1000).returncode == 0
    assert_bitwise_equal(tmp_path, trained[0])


def test_accumulation_and_two_processes_make_the_same_student(trained, run, tmp_path):
    """Up to the order of floating-point summation: noise, time and prompt of a sample depend on its number alone."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    done = subprocess.run([*launch, *map(str, SHORT), "--out", str(tmp_path / "two"), "--micro-batch", "2"], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    ours, theirs = student(tmp_path / "two"), student(trained[0])
    worst = max(((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max().clamp(min=1e-3)).item() for k in ours)
    assert worst < 1e-3
    a, b = (json.loads((out / "log.jsonl").read_text().splitlines()[-1]) for out in (tmp_path / "two", trained[0]))
    assert a["bootstrap"] == pytest.approx(b["bootstrap"], rel=1e-3) and a["boundary"] == pytest.approx(b["boundary"], rel=1e-3)


def test_other_options_are_refused_in_a_used_folder(run, trained):
    done = run(*SHORT, "--out", trained[0], "--lr", "1e-5")
    assert done.returncode == 2 and "lr 0.0005 there, 1e-05 here" in done.stderr


@pytest.mark.parametrize("options", [["--guidance", "1:6"], ["--solver", "heun"], ["--guidance", "1"], ["--boundary-weight", "0"],
                                     ["--negative-prompt", "a bag in pink on blue"], ["--input-time", "1000", "--num-steps", "10"], ["--precision", "bf16"]])
def test_every_option_trains(run, tmp_path, options):
    done = run("train.py", "--out", tmp_path, "--steps", 1, "--batch", 4, *options)
    assert done.returncode == 0 and (tmp_path / "student" / "student.json").exists(), done.stderr


def test_dry_run_writes_nothing(run, tmp_path):
    done = run("train.py", "--dry-run", "--out", tmp_path / "run")
    assert done.returncode == 0 and "M parameters" in done.stdout and not (tmp_path / "run").exists()


def test_sample_writes_pictures_that_say_what_they_are(run, tmp_path):
    done = run("sample.py", "--prompt", PROMPT, "--prompt", "a blue bag on a white background", "--num", 2, "--seed", 5, "--grid", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000005.png", "000006.png", "000007.png", "000008.png", "grid.png"]
    image = Image.open(tmp_path / "000005.png")
    assert image.size == (32, 32) and image.text["prompt"] == PROMPT and image.text["seed"] == "5"
    assert float(image.text["guidance"]) > 1 and image.text["student"].endswith("student")


def test_image_depends_on_its_seed_alone(run, tmp_path):
    run("sample.py", "--prompt", PROMPT, "--seed", 3, "--num", 5, "--batch", 5, "--out", tmp_path / "a")
    run("sample.py", "--prompt", PROMPT, "--seed", 6, "--num", 1, "--out", tmp_path / "b")
    a, b = (list(Image.open(tmp_path / f / "000006.png").getdata()) for f in "ab")
    assert max(abs(x - y) for p, q in zip(a, b) for x, y in zip(p, q)) <= 1         # a batch may round differently


def test_compare_puts_the_teacher_beside(run, tmp_path):
    assert run("sample.py", "--prompt", PROMPT, "--compare", 1, 4, "--out", tmp_path).returncode == 0
    assert Image.open(tmp_path / "000000.png").size == (3 * 32, 32)


def test_evaluate_writes_the_table_and_reuses_the_teachers_rows(run, trained, tmp_path):
    args = ["-m", "tools.evaluate", "--student", trained[0], "--json", tmp_path / "e.json"]
    stored = sorted(p.name for p in (TINY / "evaluation").iterdir())
    done = run(*args, "--images", 5000, timeout=250)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (TINY / "evaluation").iterdir()) == stored        # nothing was measured again
    result = json.loads((tmp_path / "e.json").read_text())
    assert [(r["sampler"], r["steps"], r["nfe"]) for r in result["rows"]] == [("ddim", k, 2 * k) for k in (1, 2, 4, 8, 10, 25, 50)] + [("student", 1, 1)]
    assert all(set(r) >= {"frechet", "precision", "recall", "align_seen", "align_heldout", "rmse", "images_per_s"} for r in result["rows"])
    assert result["images"] == 5000 and Image.open(tmp_path / "e.png").size == (960, 8 * 96)


@pytest.fixture
def bad(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize("command, message", [
    ("train.py --teacher nosuch", "teacher 'nosuch' is neither a name (tiny) nor a folder"),
    ("train.py --solver rk4", "invalid choice: 'rk4'"),
    ("train.py --guidance 5:2", "--guidance 5:2 is neither a number nor LO:HI"),
    ("train.py --input-time 1001", "--input-time 1001 is not supported: 1 to 1000"),
    ("train.py --num-steps 0", "--num-steps 0 is not supported: 1 to 1000"),
    ("train.py --batch 10 --micro-batch 4", "--micro-batch 4 does not divide 10"),
    ("train.py --prompts {bad}/empty.txt", "empty.txt holds no prompt"),
    ("train.py --prompts {bad}/latin1.txt", "latin1.txt is not UTF-8 text (byte 3)"),
    ("train.py --prompts {bad}/none.txt", "none.txt is missing"),
    ("train.py --out {bad}/file/run", "can't write"),
    ("train.py --device nosuch", "--device nosuch"),
    ("sample.py", "no prompt"),
    ("sample.py --prompt x --student {bad}", "holds no student"),
    ("sample.py --prompt x --out {bad}/file", "can't write"),
    ("sample.py --prompt x --guidance 40", "--guidance 40.0 is not supported by this student"),
    ("sample.py --prompt x --compare 0", "--compare 0 is not supported"),
    ("-m tools.evaluate --images 5", "--images 5 is too few")])
def test_bad_input_is_one_sentence_and_exit_code_2(run, bad, command, message):
    arguments = command.format(bad=bad).split()
    done = run(*arguments, *(["--out", bad / "run"] if arguments[0] == "train.py" and "--out" not in arguments else []))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_broken_checkpoint_is_named_and_kept(run, trained, tmp_path):
    import shutil
    out = shutil.copytree(trained[0], tmp_path / "run")
    state = out / "state" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    done = run(*SHORT, "--out", out, "--steps", 8)
    assert done.returncode == 2 and "is not a whole safetensors file" in done.stderr
    assert state.stat().st_size == 1000
    assert_bitwise_equal(out, trained[0])


def test_long_prompt_is_cut_with_a_warning(run, tmp_path):
    done = run("sample.py", "--prompt", "red " * 90 + "hat", "--out", tmp_path)
    assert done.returncode == 0 and "warning: prompt cut to 77 tokens" in done.stderr and "hat" in done.stderr
