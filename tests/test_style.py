"""The form of the code, counted file by file. What comments say is judged by reading, not here."""
import ast

import pytest

from conftest import ROOT

FILES = [*ROOT.glob("*.py"), *ROOT.glob("clip/*.py"), *ROOT.glob("tests/toy*.py")]
NAMES = sorted(str(path.relative_to(ROOT)) for path in FILES)
COLUMNS = 100
LINES = 45  # of a function: what fits a screen
INHERITED = ("forward", "train")  # methods that torch's nn.Module documents


def wide_lines(text):
    """A reader has two files side by side."""
    lines = enumerate(text.splitlines(), 1)
    return [f"{number}: {len(line)} columns" for number, line in lines if len(line) > COLUMNS]


def crowded_lines(text):
    """A statement is the first thing on its line: neither `a; b` nor `if a: b` nor `else: b`."""
    lines = text.encode().splitlines()  # positions are counted in bytes
    return [f"{node.lineno}: a statement in the middle of a line" for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.stmt) and lines[node.lineno - 1][:node.col_offset].strip()]


def assigned_lambdas(text):
    """`f = lambda x: ...` is a function without a name, a docstring and a place to stop in."""
    return [f"{node.lineno}: a lambda with a name" for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and isinstance(node.value, ast.Lambda)]


def long_functions(text):
    lengths = [(node, node.end_lineno - node.lineno + 1) for node in ast.walk(ast.parse(text))
               if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [f"{node.lineno}: {node.name} has {length} lines" for node, length in lengths if length > LINES]


def undocumented(text):
    """The file itself, and its public functions, classes and methods. Functions within functions are not public."""
    tree = ast.parse(text)
    missing = [] if ast.get_docstring(tree) else ["1: the file has no docstring"]
    found = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node in list(found):
        if isinstance(node, ast.ClassDef):
            found += [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name not in INHERITED]
    return missing + [f"{node.lineno}: {node.name} has no docstring" for node in found
                      if not node.name.startswith("_") and not ast.get_docstring(node)]


RULES = [wide_lines, crowded_lines, assigned_lambdas, long_functions, undocumented]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_style(name, rule):
    found = rule((ROOT / name).read_text(encoding="utf-8"))
    assert not found, f"{name}:" + f"\n{name}:".join(found)


def test_the_files_are_all_there():
    assert {"eval.py", "stage1_cam.py", "stage2_weakclip.py", "stage3_segment.py", "clip/model.py"} < set(NAMES)


BAD = {
    wide_lines: ["x = 1  # " + 100 * "-"],
    crowded_lines: ["a = 1; b = 2", "if a: b", "if a:\n    b\nelse: c", "for a in b: c", "class A: pass",
                    "def f(): return 1", "if (a and\n        b): c", "é = 1; b = 2"],
    assigned_lambdas: ["f = lambda x: x", "f: object = lambda: 1", "print(f := (lambda: 1))"],
    long_functions: ["def f():\n" + 45 * "    a\n", "class A:\n    def f(self):\n" + 45 * "        a\n"],
    undocumented: ["a = 1", '"""A file."""\ndef f():\n    pass', '"""A file."""\nclass A:\n    """One."""\n    def f(self):\n        pass'],
}
GOOD = '''"""A file."""
import os

text = "a; b"

def _helper(x):
    return x


@_helper
def function(x):
    """What comes back."""
    if x:
        return sorted(x, key=lambda y: -y)
    elif x is None:
        return [y for y in x if y]
    else:
        def inner():
            return x
    try:
        return inner()
    except OSError:
        return x[1:2]


class Thing:
    """A thing."""

    def __init__(self):
        self.x: int = 1

    def forward(self, x):
        return x
'''


@pytest.mark.parametrize("rule, text", [(rule, text) for rule, texts in BAD.items() for text in texts])
def test_a_rule_sees_what_it_forbids_and_nothing_else(rule, text):
    assert rule(text)
    assert not rule(GOOD)
