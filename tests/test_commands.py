"""Whole commands on the embedded teacher, as a person runs them.

Train, kill, resume, sample, evaluate, and bad input.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from plumbing.files import command
from plumbing.hub import TINY
from plumbing.weights import WEIGHTS
from conftest import ROOT
from plumbing.checkpoints import checkpoints
from plumbing.prompts import compose_prompts
from REMOVED import learning_rate

SHORT = ["train.py", "--batch", 8, "--steps", 5, "--save-every", 2, "--sample-every", 0, "--warmup", 2]
PROMPT = "a red ankle boot on a yellow background"


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The folder of a finished short run, to compare with."""
    out = tmp_path_factory.mktemp("run")
    done = run(*SHORT, "--out", out, "--sample-every", 5)
    assert done.returncode == 0, done.stderr
    return out, done


def student(out):
    return load_file(out / "student" / WEIGHTS)


def assert_bitwise_equal(a, b):
    a, b = student(a), student(b)
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_training_leaves_everything_and_says_where(trained):
    out, done = trained
    assert f"python sample.py --student {out}" in done.stdout
    assert f"python -m tools.evaluate --student {out}" in done.stdout
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "samples", "student", "state"}
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 5 and all(last[name] > 0 for name in ("bootstrap", "boundary", "matching", "critic"))
    assert Image.open(out / "samples" / "step_5.png").size == (8 * 96, 2 * 96)
    before = load_file(TINY / "unet" / WEIGHTS)["conv_in.weight"].float()
    assert not student(out)["conv_in.weight"].equal(before)


def test_two_runs_are_bitwise_equal(run, trained, tmp_path):
    assert run(*SHORT, "--out", tmp_path).returncode == 0
    assert_bitwise_equal(tmp_path, trained[0])


def start(*args):
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def test_killed_run_resumes_bitwise(run, trained, tmp_path):
    process = start(*SHORT, "--out", tmp_path)
    wait_for(tmp_path / "state" / "step_2", process)
    process.kill()                                                          # -9: no handler runs
    process.wait()
    done = run(*SHORT, "--out", tmp_path)
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stderr
    assert_bitwise_equal(tmp_path, trained[0])


def test_composed_prompts_are_many_distinct_and_repeatable():
    prompts = compose_prompts()
    assert len(set(prompts)) == 100_000 and prompts[:50] == compose_prompts(50)
    assert all(3 <= len(prompt.split()) <= 24 for prompt in prompts)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_stopped_run_saves_at_the_next_step(run, trained, tmp_path, number, code):
    """Only Ctrl-C is a failure, so that `train && evaluate` does not go on to evaluate."""
    process = start(*SHORT, "--out", tmp_path, "--save-every", 1000)
    wait_for(tmp_path / "config.json", process)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == code and "stopping after this step" in output and "stopped at step" in output, output
    assert len(checkpoints(tmp_path)) == 1, output
    assert run(*SHORT, "--out", tmp_path, "--save-every", 1000).returncode == 0
    assert_bitwise_equal(tmp_path, trained[0])


def test_accumulation_and_two_processes_make_the_same_student(trained, run, tmp_path):
    """Up to floating-point summation order: noise, time and prompt of a sample depend on its number alone."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=0",
              "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    done = subprocess.run([*launch, *map(str, SHORT), "--out", str(tmp_path / "two"), "--micro-batch", "2"],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    ours, theirs = student(tmp_path / "two"), student(trained[0])
    before = {k: v.float() for k, v in load_file(TINY / "unet" / WEIGHTS).items()}
    apart, moved = (sum((a[k] - b[k]).square().sum().item() for k in before) ** 0.5
                    for a, b in ((ours, theirs), (theirs, before)))
    assert apart < 0.02 * moved
    logs = [(out / "log.jsonl").read_text().splitlines() for out in (tmp_path / "two", trained[0])]
    a, b = (json.loads(lines[-1]) for lines in logs)
    for name in ("bootstrap", "boundary", "matching", "critic"):
        assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_other_options_are_refused_in_a_used_folder(call, trained):
    code, _, stderr = call("train", *SHORT[1:], "--out", trained[0], "--lr", "1e-5")
    assert code == 2 and "lr 0.0005 there, 1e-05 here" in stderr
    code, _, stderr = call("train", *SHORT[1:], "--out", trained[0], "--teacher", "tiny-pixel")
    assert code == 2 and "holds another run (teacher tiny there, tiny-pixel here; " in stderr


@pytest.mark.parametrize("options", [
    ["--guidance", "1:6"], ["--solver", "euler"], ["--guidance", "1"], ["--boundary-weight", "0"],
    ["--negative-prompt", "a bag in pink on blue"], ["--input-time", "1000"], ["--num-steps", "25"],
    ["--weight", "1"], ["--match", "0"], ["--match", "0.1"], ["--match-from", "0.9"], ["--match-guidance", "0.5"],
    ["--match-until", "1"], ["--match-lr", "1e-3"], ["--critic-lr", "1e-3"], ["--critic-updates", "2"],
    ["--precision", "bf16"], ["--seed", "1"], ["--lr", "1e-3"], ["--warmup", "7"], ["--decay", "0"],
    ["--ema", "0.1"], ["--prompts", "README.md"]])
def test_every_option_makes_another_student(call, trained, tmp_path, options):
    assert call("train", *SHORT[1:], "--out", tmp_path, *options)[0] == 0
    ours, theirs = student(tmp_path), student(trained[0])
    changed = {k for k in theirs if not ours[k].equal(theirs[k])}
    assert "conv_in.weight" in changed and "mid_block.attentions.0.proj_in.weight" in changed


def test_learning_rate_warms_up_holds_and_decays():
    args = argparse.Namespace(steps=100, warmup=10, decay=0.5, lr=2.0, match_lr=0.0)
    rates = [learning_rate(step, args, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:51] == [2.0] * 42
    assert rates[75] == pytest.approx(1.0) and 0 < rates[99] < 0.05


def test_learning_rate_decays_to_that_of_matching_and_then_to_zero():
    args = argparse.Namespace(steps=150, warmup=10, decay=0.5, lr=2.0, match_lr=1.0)
    rates = [learning_rate(step, args, 100) for step in range(150)]
    assert rates[9:51] == [2.0] * 42 and rates[75] == pytest.approx(1.5) and rates[100:126] == [1.0] * 26
    assert rates[137] == pytest.approx(0.52) and 0 < rates[149] < 0.05


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(call, tmp_path):
    code, _, stderr = call("train", *SHORT[1:], "--out", tmp_path, "--lr", "1e20", "--save-every", 1)
    assert code == 2 and "guidance [3.0" in stderr
    assert "error: bootstrap and boundary and" in stderr and "not finite at step 1" in stderr
    assert all(v.isfinite().all() for v in student(tmp_path).values())


def test_resumed_log_has_every_step_once(call, tmp_path):
    log = tmp_path / "log.jsonl"
    options = [*SHORT[1:], "--out", tmp_path, "--steps"]
    assert call("train", *options, 10)[0] == 0
    # as a kill after the checkpoint leaves it
    log.write_text(log.read_text() + json.dumps({"step": 17, "seconds": 99}) + "\n")
    assert call("train", *options, 20)[0] == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20] and lines[0]["seconds"] < lines[1]["seconds"] < 99


@pytest.mark.parametrize("teacher, input_time", [("tiny", 600), ("tiny-pixel", 1000)])
def test_dry_run_prints_the_plan_and_writes_nothing(call, tmp_path, teacher, input_time):
    """An epsilon student reads its input where noise is 2.27 times the signal, one of v at T."""
    code, stdout, _ = call("train", "--dry-run", "--teacher", teacher, "--out", tmp_path / "run")
    assert code == 0 and f"guidance 3.0, input time {input_time}, 1300 steps of 32, 32 at once" in stdout
    assert "matched after 585 with a critic as large" in stdout
    assert not (tmp_path / "run").exists()


def test_sample_writes_pictures_that_say_what_they_are(run, tmp_path):
    began = time.time()
    done = run("sample.py", "--prompt", PROMPT, "--prompt", "a blue bag on a white background", "--num", 2,
               "--seed", 5, "--grid", "--out", tmp_path)
    assert done.returncode == 0 and time.time() - began < 20, done.stderr
    names = ["000005.png", "000006.png", "000007.png", "000008.png", "grid.png", "index.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    image = Image.open(tmp_path / "000005.png")
    assert image.size == (32, 32) and image.text["prompt"] == PROMPT and image.text["seed"] == "5"
    assert float(image.text["guidance"]) > 1 and image.text["student"] == f"{ROOT.name}/tiny"


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_image_depends_on_its_seed_alone(call, tmp_path):
    call("sample", "--prompt", PROMPT, "--seed", 3, "--num", 5, "--batch", 5, "--out", tmp_path / "a")
    call("sample", "--prompt", PROMPT, "--seed", 6, "--num", 1, "--out", tmp_path / "b")
    a, b = pixels(tmp_path / "a" / "000006.png"), pixels(tmp_path / "b" / "000006.png")
    assert abs(a - b).max() <= 1                            # a batch of another size may round differently
    assert abs(a - pixels(tmp_path / "a" / "000005.png")).max() > 20


def test_compare_puts_the_teacher_left_of_the_student(call, tmp_path):
    call("sample", "--prompt", PROMPT, "--out", tmp_path / "alone")
    assert call("sample", "--prompt", PROMPT, "--compare", 1, 4, "--out", tmp_path)[0] == 0
    grid, alone = pixels(tmp_path / "000000.png"), pixels(tmp_path / "alone" / "000000.png")
    assert grid.shape == (32, 96, 3)
    assert (grid[:, 64:] == alone).all() and not (grid[:, :32] == alone).all()


def test_refined_picture_is_another_and_says_so(call, tmp_path):
    call("sample", "--prompt", PROMPT, "--out", tmp_path / "one.png")
    assert call("sample", "--prompt", PROMPT, "--refine", 2, "--out", tmp_path / "three.png")[0] == 0
    assert abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "three.png")).max() > 2
    assert [Image.open(tmp_path / name).text["refine"] for name in ("one.png", "three.png")] == ["", "2"]


def test_evaluate_writes_the_table_that_keeps_the_readmes_promise(run, tmp_path):
    """The shipped student is better than the teacher's fifty steps, and the teacher's rows are not measured again."""
    stored = sorted(p.name for p in (TINY / "evaluation").iterdir())
    done = run("-m", "tools.evaluate", "--refine", 1, "--json", tmp_path / "e.json", timeout=250)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (TINY / "evaluation").iterdir()) == stored    # nothing was measured again
    result = json.loads((tmp_path / "e.json").read_text())
    rows, teacher = result["rows"], [("ddim", k, 2 * k, 3) for k in (1, 2, 4, 8, 10, 25, 50)] + [("ddim", 50, 100, 2)]
    student = [("student", 1, 1, 3), ("student", 2, 3, 3)]
    assert [(r["sampler"], r["steps"], r["nfe"], r["guidance"]) for r in rows] == teacher + student
    figures = {"frechet", "to_teacher", "drift", "channel_mean", "channel_std", "precision", "recall", "align_seen",
               "align_heldout", "rmse", "images_per_s"}
    assert all(set(r) >= figures for r in rows)
    assert result["images"] == 5000 and Image.open(tmp_path / "e.png").height == 8 * 96
    *_, fifty, at_best, one, refined = rows
    assert refined["frechet"] < one["frechet"] < at_best["frechet"] and one["frechet"] < 0.9 * fifty["frechet"]
    assert all(one[name] > 0.97 * fifty[name] for name in ("precision", "recall", "align_seen", "align_heldout"))
    assert one["images_per_s"] > refined["images_per_s"] > fifty["images_per_s"]


@pytest.fixture
def bad(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize("command, message", [
    ("train --teacher nosuch", "'nosuch' is neither a name (tiny"),
    ("train --solver rk4", "invalid choice: 'rk4'"),
    ("train --guidance 5:2", "--guidance 5:2 is neither a number nor LO:HI"),
    ("train --guidance nan", "--guidance nan is neither a number nor LO:HI"),
    ("train --lr -1", "--lr -1.0 is not supported"),
    ("train --input-time 1001", "--input-time 1001 is not supported: 1 to 1000"),
    ("train --num-steps 0", "--num-steps 0 is not supported: 1 to 1000"),
    ("train --batch 10 --micro-batch 4", "--micro-batch 4 does not divide 10"),
    ("train --prompts {bad}/empty.txt", "empty.txt holds no prompt"),
    ("train --prompts {bad}/latin1.txt", "latin1.txt is not UTF-8 text (byte 3)"),
    ("train --prompts {bad}/none.txt", "none.txt is missing"),
    ("train --out {bad}/file/run", "can't write"),
    ("train --device nosuch", "--device nosuch is not available"),
    ("sample", "nothing to paint: give --prompt TEXT"),
    ("sample --prompt x --student {bad}", "holds no student"),
    ("sample --prompt x --teacher {bad}", "holds no model in the diffusers layout: there is no scheduler_config.json"),
    ("sample --prompt x --out {bad}/file", "can't write"),
    ("sample --prompt x --guidance 40", "--guidance 40.0 is not supported by this student"),
    ("sample --prompt x --compare 1001", "--compare 1001 is not supported: 1 to 1000"),
    ("sample --prompt x --seed -1", "--seed -1 is not supported"),
    ("train --match-from 1", "--match-from 1.0 is not supported: 0 to 0.99"),
    ("sample --prompt x --refine -1", "--refine -1 is not supported"),
    ("tools.evaluate --images 5", "--images 5 is too few"),
    ("tools.evaluate --refine 0", "--refine 0 is not supported: 1 to 200"),
    ("tools.evaluate --refine 1000", "--refine 1000 is not supported: 1 to 200"),
    ("tools.train_tiny --data {bad} --out {bad}/t --work {bad}/w", "apt-get install dataset-fashion-mnist")])
def test_bad_input_is_one_sentence_and_exit_code_2(call, bad, command, message):
    name, *options = command.format(bad=bad).split()
    out = ["--out", bad / "run"] if name == "train" and "--out" not in options else []
    code, _, stderr = call(name, *options, *out)
    assert code == 2 and message in stderr and not (bad / "run").exists(), stderr


def test_bad_input_ends_the_process_without_a_traceback(run, bad):
    for command in (["train.py", "--teacher", "nosuch"], ["sample.py"]):
        done = run(*command)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_student_of_another_teacher_is_refused(call, trained, tmp_path):
    info = json.loads((trained[0] / "student" / "student.json").read_text())
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "student" / "student.json").write_text(json.dumps({**info, "fingerprint": "0"}))
    code, _, stderr = call("sample", "--student", tmp_path / "run", "--prompt", PROMPT)
    assert code == 2 and "was made for another teacher" in stderr


def test_broken_checkpoint_is_named_and_kept(call, trained, tmp_path):
    out = shutil.copytree(trained[0], tmp_path / "run")
    files = [file for folder in checkpoints(out).values() for file in folder.glob("*.safetensors")]
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    code, _, stderr = call("train", *SHORT[1:], "--out", out, "--steps", 8)
    assert code == 2 and f"{files[0]} is damaged" in stderr and f"move {out} away to start anew" in stderr
    assert all(file.stat().st_size == 1000 for file in files)
    assert_bitwise_equal(out, trained[0])


def test_long_prompt_is_cut_with_a_warning(run, tmp_path):
    done = run("sample.py", "--prompt", "red " * 90 + "hat", "--out", tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: prompt cut to 77 tokens") and "hat" in done.stderr


def test_training_warns_of_long_prompts_once(call, tmp_path):
    (tmp_path / "long.txt").write_text("".join("red " * 90 + f"hat {k}\n" for k in range(32)))
    code, _, stderr = call("train", "--prompts", tmp_path / "long.txt", "--out", tmp_path / "run", "--steps", 2,
                           "--sample-every", 0)
    assert code == 0 and stderr.count("prompt cut") == 1 and "others like it are not shown" in stderr


def test_out_of_memory_says_what_to_do(capsys):
    with pytest.raises(SystemExit, match="2"):
        command(lambda: torch.empty(2**50))
    assert capsys.readouterr().err.startswith("error: out of memory, give half the --micro-batch")
