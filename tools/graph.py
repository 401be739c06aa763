"""A student as one graph of ONNX, for programs without PyTorch: noise and token ids go in, the pixels of an image come
out. `python -m tools.export --onnx` writes it, and tools.web does for a page. It needs onnx and onnxscript.

    import onnxruntime                                      # or onnxruntime-web, in a browser
    graph = onnxruntime.InferenceSession("exported/tiny/student.onnx")
    [images] = graph.run(None, {"eps": eps, "tokens": tokens})

    eps         (1, C, h, w) float32, Gaussian noise; plumbing.images.noise is that of sample.py's seeds
    tokens      (1, 77) int64, the prompt by the teacher's tokenizer; or label (1,) int64; or nothing
    guidance    (1,) float32, the scale w, where the student was trained on a range and no scale was chosen
    images      (1, H, W, 3) uint8
"""

import contextlib
import io
import logging
import warnings

import torch
from torch import nn

from model import UNet
from plumbing.files import BadInput, read_json
from plumbing.weights import build
from signal_ode import student_signal

LARGE = 2**30           # bytes of weights that need a file of their own beside the graph, which can have 2 GB
SMALL = 1000            # numbers of a tensor that stays in float32, such as a norm's or a bias


class Graph(nn.Module):
    """eps and a condition to pixels. tensors: of the student's U-Net with its target time folded (tools.export.fold).
    """

    def __init__(self, student, tensors):
        super().__init__()
        path = student.teacher.unet_folder / "config.json"
        config, guidance = read_json(path), tensors.get("time_embedding.cond_proj.weight")
        config["time_cond_proj_dim"] = None if guidance is None else guidance.shape[1]
        self.network = build(UNet, config, tensors, path)
        self.text_encoder, self.vae = student.teacher.text_encoder, student.teacher.vae
        self.schedule, self.input_time = student.teacher.schedule, student.input_time

    def output(self, x_i, i, _, **condition):
        return self.network(x_i, torch.full((1,), self.schedule.timestep(i)), **condition)

    def forward(self, eps, tokens=None, label=None, guidance=None):
        condition = {"text": None if tokens is None else self.text_encoder(tokens), "label": label}
        images = student_signal(self.output, eps, 0, self.input_time, self.schedule, guidance=guidance, **condition)
        images = images if self.vae is None else self.vae.decode(images)
        return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def inputs_of(student, graph):
    """{name: an example} of the graph's inputs."""
    teacher, inputs = student.teacher, {"eps": torch.zeros(1, *student.teacher.shape)}
    if teacher.text_encoder:
        inputs["tokens"] = teacher.tokenizer([""])
    if teacher.labels:
        inputs["label"] = torch.zeros(1, dtype=torch.int64)
    if graph.network.settings["time_cond_proj_dim"]:
        inputs["guidance"] = torch.tensor([student.pick_guidance()])
    return inputs


@torch.no_grad()
def write_graph(path, student, tensors, half=False):
    """Write a student's graph. If its weights have more than 1 GB, they get a second file with .data after the name,
    because ONNX allows 2 GB in one. It computes in float32; `half` stores the weights in float16. `tensors`: of
    tools.export.fold. Raises BadInput."""
    try:
        import onnx
        import onnxscript  # noqa: F401, which torch.onnx needs
    except ImportError:
        raise BadInput("a graph of ONNX needs two packages: pip install onnx onnxscript") from None
    graph = Graph(student, tensors).eval()
    inputs = inputs_of(student, graph)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)             # torchvision is not missed
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(graph, kwargs=inputs, input_names=list(inputs), output_names=["images"],
                                    dynamo=True, verbose=False)
    model = program.model_proto
    for node in model.graph.node:                           # which line of Python made it: a fifth of a small file
        del node.metadata_props[:]
    if half:
        store_in_half(model.graph, onnx)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=size > LARGE, location=f"{path.name}.data")


def store_in_half(graph, onnx):
    """Make every large float32 tensor of a graph one of float16, which a node casts when the graph is loaded. A mask,
    which float16 does not hold, stays."""
    casts = []
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == "float32" and values.size > SMALL and abs(values).max() < 60_000:
            name, half = tensor.name, f"{tensor.name}.half"
            casts.append(onnx.helper.make_node("Cast", [half], [name], to=onnx.TensorProto.FLOAT))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float16"), half))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
