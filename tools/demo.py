"""A page on which the picture follows the typing, the teacher's beside it, and the time of both.

    python -m tools.demo                                    the shipped student, at http://127.0.0.1:7860
    python -m tools.demo --student runs/sd21 --precision bf16
    python -m tools.demo --student runs/range --share       also at a public address, for a week

A picture is the one that sample.py makes of the same prompt, seed and scale. What is downloaded says so in its text
chunks, as sample.py's files do. A teacher that is slow can be unticked. It needs gradio.
"""

import tempfile
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import torch

from plumbing.files import BadInput, command, new_parser, user_spec
from plumbing.hub import TINY, is_embedded
from plumbing.images import noise, save_png, to_pil
from plumbing.processes import PRECISION
from plumbing.prompts import training_prompts
from sample import Job, open_student, sample_batch
from student import REFINE_FROM

LAST, KEPT = 8, 1000        # pictures of the strip; files that are kept
STYLE = """img {image-rendering: pixelated}
    :is(#student, #teacher) img {width: 100%; height: 100%; object-fit: contain}"""


class Painter:
    """What the page asks for: the pictures of a student and of its teacher, as PNG files in a folder."""

    def __init__(self, student, about, folder):
        self.student, self.about, self.folder = student, about, Path(folder)

    def save(self, image, about):
        path = self.folder / f"{time.time():.6f}-{uuid.uuid4().hex[:6]}.png"
        save_png(path, image, about)
        for old in sorted(self.folder.iterdir())[:-KEPT]:
            old.unlink(missing_ok=True)
        return str(path)

    @torch.no_grad()
    def paint(self, refine, strip, *job):
        """(file, what it took, the strip of the latest files, twice: to be shown and to be kept)."""
        job, began = self.job(*job), time.perf_counter()
        [image] = sample_batch(self.student, SimpleNamespace(refine=refine, compare=[]), [job])
        steps = f"1 + {refine} steps" if refine else "one step"
        took = f"**student, {steps}: {time.perf_counter() - began:.3f} s**"
        path = self.save(image, job._asdict() | self.about | {"refine": refine or ""})
        return path, took, [path, *strip][:LAST], [path, *strip][:LAST]

    @torch.no_grad()
    def paint_teacher(self, ticked, steps, *job):
        """(file, what it took), or nothing where the box is not ticked."""
        if not ticked:
            return None, ""
        job, teacher, began = self.job(*job), self.student.teacher, time.perf_counter()
        eps, condition = noise([job.seed], teacher.shape).to(teacher.device), teacher.encode([job.prompt])
        latents = teacher.solve(eps, teacher.schedule.grid(steps), w=job.guidance, **condition)
        [image] = to_pil(teacher.decode(latents, [job.seed]))
        took = f"**teacher, {steps} steps: {time.perf_counter() - began:.3f} s**"
        return self.save(image, job._asdict() | {"teacher": teacher.spec, "steps": steps}), took

    def job(self, prompt, seed, guidance):
        return Job("", prompt or "", int(seed or 0), self.student.pick_guidance(guidance))


def build_page(gradio, painter, first):
    """The page. first: the prompt or label it begins with."""
    student, teacher = painter.student, painter.student.teacher
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
            ticked = gradio.Checkbox(is_embedded(teacher.spec) or teacher.device.type == "cuda", label="teacher")
        pictures, words = [], []
        with gradio.Row():
            for name in ("student", "teacher"):
                with gradio.Column():
                    words.append(gradio.Markdown())
                    pictures.append(gradio.Image(label=name, format="png", height=400, interactive=False,
                                                 elem_id=name, buttons=["download", "fullscreen"]))
        strip, kept = gradio.Gallery(label="the last ones", columns=LAST, height=170, format="png"), gradio.State([])
        job = [prompt, seed, guidance]
        for function, own, outputs in (
                (painter.paint, [refine, kept], [pictures[0], words[0], strip, kept]),
                (painter.paint_teacher, [ticked, steps], [pictures[1], words[1]])):
            changes = [part.change for part in (*own, *job) if part is not kept]
            gradio.on([page.load, *changes], function, [*own, *job], outputs, trigger_mode="always_last",
                      show_progress="hidden")
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
    args = p.parse_args()
    try:
        import gradio
    except ImportError:
        raise BadInput("tools.demo needs gradio: pip install gradio") from None
    student, about = open_student(SimpleNamespace(**vars(args), compare=[], refine=0))
    first = args.prompt or training_prompts(student.teacher)[0]
    student.teacher.encode([first])                         # an unknown label is found now
    with tempfile.TemporaryDirectory() as folder:
        painter = Painter(student, about, folder)
        painter.paint(0, [], first, 0, student.pick_guidance())         # the first is slow, and no one's time
        page = build_page(gradio, painter, first)
        page.launch(share=args.share, server_port=args.port, css=STYLE, footer_links=[], show_error=True)


if __name__ == "__main__":
    command(main)
