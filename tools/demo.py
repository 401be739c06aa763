"""A page on which the picture follows the typing, the teacher's beside it, and the time of both.

    python -m tools.demo                                    the shipped student, at http://127.0.0.1:7860
    python -m tools.demo --student runs/sd21 --precision bf16
    python -m tools.demo --student runs/range --share       also at a public address, for a week

An image is the one that sample.py makes of the same prompt, seed and scale, and its file says so in its text chunks. On
a CPU the box of a large teacher is not ticked, because the two slow each other down. It needs gradio 6.
"""

import itertools
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from plumbing.files import BadInput, command, new_parser, user_spec
from plumbing.hub import TINY, is_embedded
from plumbing.images import read_about, save_png
from plumbing.processes import PRECISION
from plumbing.prompts import training_prompts
from sample import Job, open_student, sample_batch
from student import REFINE_FROM
from tools.fidelity import Sampler

LAST, KEPT = 8, 1000        # images of the strip; files that are kept
STYLE = """img {image-rendering: pixelated}
    :is(#student, #teacher) img {width: 100%; height: 100%; object-fit: contain}"""


class Images:
    """What the page asks for: images of a student and of its teacher, as PNG files in a folder."""

    def __init__(self, student, about, folder):
        self.student, self.about, self.folder, self.numbers = student, about, Path(folder), itertools.count()

    @torch.no_grad()
    def sample(self, sampler, about, refine, prompt, seed, guidance):
        """(path of the file, seconds) of an image by the student, or by a tools.fidelity.Sampler."""
        job, began = Job("", prompt or "", int(seed or 0), self.student.pick_guidance(guidance)), time.perf_counter()
        [image] = sample_batch(sampler, SimpleNamespace(refine=refine, compare=[]), [job])
        seconds, number = time.perf_counter() - began, next(self.numbers)
        path = self.folder / f"{number:09d}.png"
        save_png(path, image, job._asdict() | about)
        (self.folder / f"{number - KEPT:09d}.png").unlink(missing_ok=True)
        return str(path), seconds

    def of_student(self, refine, strip, *job):
        """(path, a line of text, the paths of the strip to be shown, and the same to be kept). In the strip no image is
        twice."""
        path, seconds = self.sample(self.student, self.about | {"refine": refine or ""}, refine, *job)
        others = [old for old in strip if Path(old).exists() and read_about(old) != read_about(path)]
        strip = [path, *others][:LAST]
        steps = f"1 + {refine} steps" if refine else "one step"
        return path, f"**student, {steps}: {seconds:.3f} s**", strip, strip

    def of_teacher(self, ticked, steps, *job):
        """(path, a line of text), or nothing where the box is not ticked."""
        if not ticked:
            return None, ""
        teacher, (_, _, w) = self.student.teacher, job
        sampler = Sampler(teacher, self.student.pick_guidance(w), steps)
        path, seconds = self.sample(sampler, {"teacher": teacher.spec, "steps": steps}, 0, *job)
        return path, f"**teacher, {steps} steps: {seconds:.3f} s**"


def build_page(gradio, images, first, with_teacher=True):
    """The page, a gradio.Blocks. first: the prompt or label it begins with. with_teacher: whether its box is ticked."""
    student, teacher = images.student, images.student.teacher
    low, high = student.guidance if student.ranged else (student.guidance, student.guidance + 1)
    with gradio.Blocks(title="BOOT", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown(f"# One step\nA student of {teacher.spec}, and its teacher from the same noise.")
        if teacher.labels:
            names = [name for name in teacher.labels if name]
            prompt = gradio.Dropdown(names, value=first, label="label")
        else:
            prompt = gradio.Textbox(first, label="prompt", visible=teacher.condition_type == "prompt")
        with gradio.Row():
            seed = gradio.Slider(0, 999, 0, step=1, label="seed")
            guidance = gradio.Slider(low, high, student.pick_guidance(), label="guidance", visible=student.ranged)
            refine = gradio.Slider(0, min(10, teacher.schedule.T // REFINE_FROM), 0, step=1, label="refining steps")
            steps = gradio.Slider(1, min(50, teacher.schedule.T), min(50, teacher.schedule.T), step=1,
                                  label="teacher's steps")
            ticked = gradio.Checkbox(with_teacher, label="teacher")
        pictures, words = [], []
        with gradio.Row():
            for name in ("student", "teacher"):
                with gradio.Column():
                    words.append(gradio.Markdown())
                    pictures.append(gradio.Image(label=name, format="png", height=400, interactive=False,
                                                 elem_id=name, buttons=["download", "fullscreen"]))
        strip = gradio.Gallery(label="the last ones", columns=LAST, height=170, format="png", object_fit="contain")
        kept = gradio.State([])
        job = [prompt, seed, guidance]
        for function, own, outputs, progress in (           # "minimal" dims an old picture until the new one is there
                (images.of_student, [refine, kept], [pictures[0], words[0], strip, kept], "hidden"),
                (images.of_teacher, [ticked, steps], [pictures[1], words[1]], "minimal")):
            changes = [part.change for part in (*own, *job) if part is not kept]
            gradio.on([page.load, *changes], function, [*own, *job], outputs, trigger_mode="always_last",
                      show_progress=progress)
    return page


def main():
    p = new_parser(__doc__)
    p.add_argument("--student", type=user_spec, default=TINY / "student", help="what train.py wrote (default: shipped)")
    p.add_argument("--teacher", type=user_spec, help="its teacher's folder, if that has moved since the training")
    p.add_argument("--prompt", help="what the page begins with (default: the teacher's first prompt or label)")
    p.add_argument("--decoder", type=user_spec, help="folder or hub id of a small decoder (AutoencoderTiny)")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    p.add_argument("--precision", choices=list(PRECISION), default="fp32", help="(default: %(default)s)")
    p.add_argument("--port", type=int, help="(default: 7860, or the next that is free)")
    p.add_argument("--share", action="store_true", help="a public address, through Gradio's servers")
    p.set_defaults(compare=[], refine=0)
    args = p.parse_args()
    try:
        import gradio
        if int(gradio.__version__.split(".")[0]) < 6:
            raise ImportError
    except ImportError:
        raise BadInput("tools.demo needs gradio 6: pip install -U gradio") from None
    student, about = open_student(args)
    first = args.prompt or training_prompts(student.teacher)[0]
    if student.teacher.labels:                              # a class may be given by its number
        names = {number: name for name, number in student.teacher.labels.items()}
        first = names[student.teacher.class_number(first)]
    with tempfile.TemporaryDirectory() as folder:
        images = Images(student, about, folder)
        job = first, 0, student.pick_guidance()
        images.of_student(0, [], *job)                      # the first of each is slow, because weights are read
        with_teacher = is_embedded(student.teacher.spec) or student.teacher.device.type == "cuda"
        images.of_teacher(with_teacher, 1, *job)
        page = build_page(gradio, images, first, with_teacher)
        page.launch(share=args.share, server_port=args.port, css=STYLE, footer_links=[], show_error=True)


if __name__ == "__main__":
    command(main)
