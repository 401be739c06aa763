"""The house: what stands where, who imports whom, and how much of it a reader meets.

- Seven files stand at the top; imports go one way; the mathematics needs torch alone; the product needs eight packages.
- The budgets: lines of code, train.py and its loop, README; no line is longer than 120 characters.
- Only Schedule.timestep knows that an index is one less than a time.
- Every command of tools/ and dev/ says in its docstring how it is run.
"""

import ast
import io
import re
import sys
import tokenize

import pytest

from conftest import ROOT

TOP = ["signal_ode", "matching", "model", "teacher", "student", "train", "sample"]
# Of ours: what each file, or each file of a folder, may import
MAY_IMPORT = {
    "signal_ode": [], "matching": ["signal_ode"], "model": ["plumbing.configs"],
    "teacher": ["signal_ode", "model", "plumbing"], "student": ["signal_ode", "model", "teacher", "plumbing"],
    "train": ["signal_ode", "matching", "student", "teacher", "plumbing"],
    "sample": ["signal_ode", "student", "teacher", "plumbing"], "plumbing": ["plumbing"],
    "tools": [*TOP, "plumbing", "tools"], "lab": [*TOP, "plumbing", "tools", "lab"],
    "dev": [*TOP, "plumbing", "tools", "dev"]}
PACKAGES = {"torch", "numpy", "einops", "safetensors", "huggingface_hub", "tqdm", "PIL"}
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef
PROSE = tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
NOT_OF_TRAIN = {"rank", "world", "lock", "disk", "scaler", "json"}


def files(*names):
    """The files of the repository that these names of folders and modules stand for."""
    return [path for name in names for path in ([ROOT / f"{name}.py"] if name in TOP else (ROOT / name).glob("*.py"))]


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def tokens(path):
    return tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)


def imported(path):
    """The names of all modules that a file imports, wherever it does."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


def code_lines(*paths):
    """How many lines of code files have, without blank lines, comments and docstrings."""
    total = 0
    for path in paths:
        docstrings = [node.body[0] for node in ast.walk(tree(path)) if isinstance(node, DOCUMENTED)
                      and ast.get_docstring(node)]
        prose = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
        code = [token for token in tokens(path) if token.type not in PROSE]
        total += len({line for token in code for line in range(token.start[0], token.end[0] + 1)} - prose)
    return total


# -------------------------------------------------------------------------------------------------------- who is where
def test_seven_files_stand_at_the_top():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(TOP)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_go_one_way(name):
    ours = {*TOP, "plumbing", "tools", "lab", "dev", "tests"}
    for path in files(name):
        for module in imported(path):
            allowed = any(f"{module}.".startswith(f"{good}.") for good in MAY_IMPORT[name])
            assert allowed or module.split(".")[0] not in ours, f"{path.name} imports {module}"


def test_the_mathematics_needs_torch_alone():
    assert {*imported(ROOT / "signal_ode.py"), *imported(ROOT / "matching.py")} == {"torch", "signal_ode"}


def test_the_product_needs_its_packages_alone():
    """Not the reference libraries. Only commands that say so need others: for curves, a page, a graph, FID."""
    optional = {"plotting.py": {"matplotlib"}, "demo.py": {"gradio"}, "graph.py": {"onnx", "onnxscript"},
                "fidelity.py": {"torch_fidelity", "transformers"}}
    for path in files(*TOP, "plumbing", "tools"):
        names = {module.split(".")[0] for module in imported(path)}
        others = names - PACKAGES - sys.stdlib_module_names - {*TOP, "plumbing", "tools"}
        assert others <= optional.get(path.name, set()), path
    named = set(re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert named == {*PACKAGES - {"PIL", "huggingface_hub"}, "pillow", "huggingface-hub", "pytest"}


def test_only_the_schedule_knows_that_an_index_is_one_less_than_a_time():
    found = [f"{path.name}: {ast.unparse(node)}" for path in files(*TOP, "plumbing", "tools", "lab", "dev")
             for node in ast.walk(tree(path)) if isinstance(node, ast.BinOp)
             and re.fullmatch(r"(t|i|s|T|time|tau|index) - 1", ast.unparse(node))]
    assert found == ["signal_ode.py: t - 1", "run.py: t - 1"]           # run.py: the times 1..T fall into bins


def test_every_command_of_a_folder_says_in_its_docstring_how_it_is_run():
    for path in files("tools", "dev"):
        if "\ndef main(" in path.read_text(encoding="utf-8"):
            assert f"python -m {path.parent.name}.{path.stem} " in ast.get_docstring(tree(path)), path


# --------------------------------------------------------------------------------------------------------- the budgets
@pytest.mark.parametrize("names, most", [(TOP, 1350), ([*TOP, "plumbing"], 2550), (["tools"], 1600), (["train"], 240)])
def test_lines_of_code_keep_within_their_budget(names, most):
    assert code_lines(*files(*names)) <= most


def test_no_line_is_longer_than_120_characters():
    long = [f"{path.relative_to(ROOT)}:{number}" for path in files(*TOP, "plumbing", "tools", "lab", "dev", "tests")
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not long


def test_train_is_the_method_and_its_loop_is_read_in_one_go():
    path = ROOT / "train.py"
    nodes = list(ast.walk(tree(path)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    for function in functions:
        assert function.end_lineno - function.lineno < 120, function.name
        assert sum(isinstance(node, ast.FunctionDef) for node in ast.walk(function)) == 1, f"nested in {function.name}"
    [loop] = [node for node in nodes if isinstance(node, ast.For) and ast.unparse(node.iter) == "run.steps()"]
    assert loop.end_lineno - loop.lineno < 90
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "option"]
    options = [call.args[0].value for call in calls]
    assert "--teacher" in options and len(options) <= 27    # 26, and --lora
    names = [token.string.lower() for token in tokens(path) if token.type == tokenize.NAME]
    assert not NOT_OF_TRAIN & {word for name in names for word in name.split("_")}


def test_readme_is_one_that_a_person_finishes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500
