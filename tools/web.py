"""A student in a web page without a server: docs/web/index.html, and the two files that it needs beside it.

    python -m tools.web                                     writes docs/web/student.onnx and words.json
    python -m http.server --directory docs/web              then open http://localhost:8000
    python -m tools.web --student runs/tiny --out site      the page and its files in another folder

The folder works on any static host as it is. The page runs the graph of tools/graph.py by onnxruntime-web, loaded
from a public server, or a copy beside itself, which this line puts there:

    npm install --no-save --prefix docs/web onnxruntime-web@1.30.0

The menus hold the words of the embedded text teacher. It needs onnx and onnxscript.
"""

import shutil

from plumbing.files import BadInput, check_new, command, new_parser, read_json, user_path, user_spec, write_json
from plumbing.hub import ROOT, TINY, is_embedded
from student import load_student
from tools.evaluate import judge_folder
from tools.export import fold
from tools.graph import write_graph

PAGE = ROOT / "docs" / "web" / "index.html"
GRAPH, WORDS = "student.onnx", "words.json"


def words(teacher):
    """What the page needs to know of the prompts: {"garments", "colours", "ids": {word: list of int}, ...}."""
    known, tokenizer = read_json(judge_folder(teacher) / "config.json"), teacher.tokenizer
    written = " ".join(["a an on background", *known["garments"], *known["colours"]])
    return {"garments": known["garments"], "colours": known["colours"], "shape": teacher.shape,
            "ids": {word: tokenizer.encode(word) for word in dict.fromkeys(written.split())},
            "start": tokenizer.start, "end": tokenizer.end, "pad": tokenizer.pad, "length": tokenizer.length}


def main():
    p = new_parser(__doc__)
    p.add_argument("--student", type=user_spec, default=TINY / "student",
                   help="of an embedded teacher of prompts (default: the shipped one)")
    p.add_argument("--guidance", type=float, help="the scale w of a student of a range (default: the middle)")
    p.add_argument("--out", type=user_path, default=PAGE.parent, help="folder (default: docs/web)")
    args = p.parse_args()
    if args.out.resolve() != PAGE.parent:
        check_new(args.out)
    student = load_student(args.student)
    if not student.teacher.text_encoder or not is_embedded(student.teacher.spec):
        raise BadInput(f"the page has the prompts of the embedded teacher, and not those of {student.teacher.spec}")
    known = words(student.teacher)
    write_graph(args.out / GRAPH, student, fold(student.network, student.pick_guidance(args.guidance)), half=True)
    write_json(args.out / WORDS, known)
    if args.out.resolve() != PAGE.parent:
        shutil.copyfile(PAGE, args.out / PAGE.name)
    print(f"{args.out}: python -m http.server --directory {args.out}, then open http://localhost:8000")


if __name__ == "__main__":
    command(main)
