"""The pages, in a real browser, and the notebook.

- In tools.demo the picture follows the typing and the sliders. It is sample.py's, and so is what is downloaded.
- A page without a server (tools.web) makes sample.py's picture of the same prompt and seed.
- Every cell of the notebook runs, the long ones cut short.
"""

import io
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, TINY
from plumbing.images import read_about

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NODE_MODULES = ROOT / "docs" / "web" / "node_modules"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PIXELS = "Array.from(document.getElementById('picture').getContext('2d').getImageData(0, 0, 32, 32).data)"

pytestmark = pytest.mark.slow


@pytest.fixture
def page():
    """A page of a headless Chromium, which asks this machine alone."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no chromium here")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(60_000)
        page.route(lambda url: "127.0.0.1" not in url and not url.startswith("data:"), lambda route: route.abort())
        yield page
        browser.close()


@pytest.fixture
def serve():
    """serve("-m", "tools.demo") starts `python -m tools.demo --port N`, and returns the address when it answers."""
    started = []

    def serve(*args, port=("--port",)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            number = free.getsockname()[1]
        process = subprocess.Popen([sys.executable, *map(str, args), *port, str(number)], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(process)
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", number)) == 0:
                    return f"http://127.0.0.1:{number}"
            assert process.poll() is None
            time.sleep(0.1)
        raise AssertionError("no answer for a minute")
    yield serve
    for process in started:
        process.terminate()
        process.wait()


def sample(call, tmp_path, *options):
    """sample.py's picture (32, 32, 3)."""
    code, _, error = call("sample", *options, "--out", tmp_path / "own.png")
    assert code == 0, error
    return np.asarray(Image.open(tmp_path / "own.png")).astype(int)


def shown(page, name, other_than=None):
    """(file's bytes, address) of the picture of this name, as soon as it is another one and stays for a second."""
    for _ in range(60):
        before = page.locator(f"#{name} img").get_attribute("src")
        page.wait_for_timeout(1000)
        address = page.locator(f"#{name} img").get_attribute("src")
        if address == before != other_than:
            return page.request.get(address).body(), address
    raise AssertionError(f"the picture of the {name} does not change")


def test_the_picture_follows_the_typing(page, serve, call, tmp_path):
    pytest.importorskip("gradio", minversion="6")
    page.goto(serve("-m", "tools.demo"))
    _, first = shown(page, "student")
    page.get_by_label("prompt").fill("")
    page.get_by_label("prompt").press_sequentially("a green coat on a pink background", delay=20)
    made, typed = shown(page, "student", first)
    (tmp_path / "downloaded.png").write_bytes(made)
    about = read_about(tmp_path / "downloaded.png")
    assert (about["prompt"], about["seed"], about["guidance"]) == ("a green coat on a pink background", "0", "3")
    own = sample(call, tmp_path, "--prompt", "a green coat on a pink background")
    assert (np.asarray(Image.open(io.BytesIO(made))).astype(int) == own).all()

    page.get_by_label("seed").first.fill("7")
    page.get_by_label("seed").first.press("Enter")
    page.get_by_label("teacher's steps").first.fill("10")
    page.get_by_label("teacher's steps").first.press("Enter")
    made, slid = shown(page, "student", typed)
    both = sample(call, tmp_path, "--prompt", "a green coat on a pink background", "--seed", 7, "--compare", 10)
    assert (np.asarray(Image.open(io.BytesIO(made))).astype(int) == both[:, 32:]).all()
    made, _ = shown(page, "teacher")
    assert abs(np.asarray(Image.open(io.BytesIO(made))).astype(int) - both[:, :32]).max() <= 1
    assert "student, one step" in page.content() and "teacher, 10 steps" in page.content()
    assert page.locator(".thumbnail-item, .grid-container img").count() > 1


@pytest.mark.parametrize("family, guidance, first, visible", [
    (None, None, "t-shirt", {"label"}), ("sd15", [2.0, 8.0], "", {"prompt", "guidance"}),
    ("ddpm-cifar10-32", 1.0, "", set())])
def test_every_kind_of_student_has_its_page(tmp_path, family, guidance, first, visible):
    """Those of classes (the shipped one), of a range of guidance and without a condition. Built without a browser."""
    gradio = pytest.importorskip("gradio", minversion="6")
    from test_export import random_student
    from student import load_student
    from tools.demo import Images, build_page
    folder = random_student(tmp_path, family, guidance) if family else TINY / "pixel"
    images = Images(load_student(folder), {}, tmp_path)
    page = build_page(gradio, images, first)
    shown = {block["props"].get("label") for block in page.get_config_file()["components"]
             if block["props"].get("visible", True)}
    assert shown & {"label", "prompt", "guidance"} == visible
    job = first, 3, images.student.pick_guidance()
    path, took, strip, kept = images.of_student(0, [str(tmp_path / "gone.png")], *job)
    assert read_about(Path(path))["seed"] == "3" and "one step" in took and strip == kept == [path]
    again, _, strip, _ = images.of_student(0, kept, *job)
    assert again != path and strip == [again]               # the same image is not in the strip twice
    path, took = images.of_teacher(True, 2, *job)
    assert read_about(Path(path))["steps"] == "2" and "2 steps" in took
    assert images.of_teacher(False, 2, *job) == (None, "")


def test_the_web_page_makes_the_same_picture(page, serve, call, tmp_path):
    pytest.importorskip("onnxscript")
    if not NODE_MODULES.exists():
        pytest.skip("npm install --prefix docs/web onnxruntime-web@1.30.0 has not run")
    code, _, error = call("tools.web", "--out", tmp_path / "site")
    assert code == 0, error
    (tmp_path / "site" / "node_modules").symlink_to(NODE_MODULES)
    assert sum(path.stat().st_size for path in (tmp_path / "site").glob("*.onnx")) < 8 * 2**20
    page.goto(serve("-m", "http.server", "--directory", tmp_path / "site", port=()))
    for seed, colour, garment, background in ((0, "red", "ankle boot", "yellow"), (7, "orange", "t-shirt", "pink"),
                                              (2**32 - 1, "white", "pair of trousers", "purple")):
        for name, value in (("colour", colour), ("garment", garment), ("background", background)):
            page.select_option(f"#{name}", value)
        page.fill("#seed", str(seed))
        article = "an" if colour == "orange" else "a"
        prompt = f"{article} {colour} {garment} on a {background} background"
        page.wait_for_function(f"document.getElementById('words').textContent.includes('{prompt}, seed {seed}:')")
        made = np.array(page.evaluate(PIXELS)).reshape(32, 32, 4)[:, :, :3]
        assert abs(made - sample(call, tmp_path, "--prompt", prompt, "--seed", seed)).max() <= 2


def test_the_page_wants_a_student_of_prompts(call, tmp_path):
    code, _, error = call("tools.web", "--student", TINY / "pixel", "--out", tmp_path / "site")
    assert code == 2 and "not those of tiny-pixel" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    code, _, error = call("tools.web", "--out", tmp_path / "mine")
    assert code == 2 and "not empty" in error


def test_the_notebook_runs(monkeypatch):
    client, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("QUICK", "1")
    notebook = nbformat.read(ROOT / "docs" / "boot.ipynb", 4)
    assert len(notebook.cells) <= 20
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in data for data in outputs) == 6 and sum("image/webp" in data for data in outputs) == 1
