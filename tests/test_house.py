"""The house: imports go one way, the mathematics knows no network, and a network's index stands in one place."""

import ast
import re

import pytest

from conftest import ROOT

BASE = {"signal_ode", "model", "tokenizer", "checkpoint"}
MAY_IMPORT = {**{name: set() for name in sorted(BASE)}, "matching": {"signal_ode"}, "teacher": BASE,
              "student": BASE | {"teacher"}, "run": BASE | {"teacher", "student"},
              "plan": BASE | {"matching", "teacher", "student", "run"},
              "train": BASE | {"matching", "teacher", "student", "run", "plan"},
              "sample": BASE | {"teacher", "student"}}


def imported(path):
    """The first part of the name of every module that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_every_product_file_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_go_one_way(name):
    ours = {*MAY_IMPORT, "tools", "tests"}
    assert set(imported(ROOT / f"{name}.py")) & ours <= MAY_IMPORT[name]


def test_the_mathematics_needs_torch_alone():
    assert set(imported(ROOT / "signal_ode.py")) == {"math", "torch"}
    assert set(imported(ROOT / "matching.py")) == {"signal_ode", "torch"}


def test_only_the_schedule_knows_that_an_index_is_one_less_than_a_time():
    lines = [line.strip() for path in (*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py"))
             for line in path.read_text(encoding="utf-8").splitlines()
             if re.search(r"\b(t|i|s|T|time|index) - 1\b", line) and not line.strip().startswith(("#", '"'))]
    assert lines == ["return t - 1"]
