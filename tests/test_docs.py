"""The form of the code, AUDIT.md beside the sources, and what the pages promise.

Sources are parsed and counted here, not run. What comments say is judged by reading.
"""
import ast
import dataclasses
import importlib
import io
import re
import shlex
from functools import lru_cache
from tokenize import COMMENT, DEDENT, ENDMARKER, INDENT, NEWLINE, NL, generate_tokens

import pytest

from conftest import ROOT
from stage2_weakclip import PAPER, RELEASED, Switches

PRODUCT = sorted([*ROOT.glob("*.py"), *ROOT.glob("clip/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
# Words of each page at most.
PAGES = {"README.md": 900, "AUDIT.md": 6000, "tests/RESULTS.md": 2000, "tests/EXERCISES.md": 800}
AUDIT = (ROOT / "AUDIT.md").read_text(encoding="utf-8")
COLUMNS, LONGEST = 100, 60  # of a line; of a function, in lines
LAYOUT = {COMMENT, DEDENT, ENDMARKER, INDENT, NEWLINE, NL}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
# Rows of AUDIT.md that hold an equation or a constant: each is cited in a source and in a test. The
# others are switches, steps without a number, and findings.
CITED = """36 37 38 39 40 44 47 49 50 51 52 53 54 12b 12c 55 3a 2b 7b 7c 13b 9b 9c 9d 56 57 58 59 60
    7d 61 11b 62 63 21a 4a 4b 64 17 67 23 24b 19b 25 68 20b 11d 69 70 31 28a 72 73 74 75 76 26b 78
    5b 79 1b 80 27b 81 30b 83 84 85 87 88 89 94 102 E1 E2 E3 E5 E6 E7 E8 E9 E10 E13 E15
    E17""".split()


@lru_cache(maxsize=None)
def measured(path):
    """(code lines, their tokens, comments and docstrings as one text) of a Python file.

    A code line holds a token that is no comment, no layout and no part of a docstring.
    """
    # Newer Pythons take an f-string apart; without its f it is one token for all of them.
    text = re.sub(r"""\b[fF](?=["'])""", "", path.read_text(encoding="utf-8"))
    tokens = list(generate_tokens(io.StringIO(text).readline))
    remarks = [t.string for t in tokens if t.type == COMMENT]
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            remarks.append(ast.get_docstring(node))
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [t for t in tokens if t.type not in LAYOUT and t.start[0] not in docstrings]
    lines = {n for t in code for n in range(t.start[0], t.end[0] + 1)}
    return len(lines), len(code), "\n".join(remarks)


# =========================================================================================== form

def faults(text):
    """What is against the rules for all code."""
    lines = text.encode().splitlines()  # positions are counted in bytes
    for number, line in enumerate(lines, 1):
        if len(line.decode()) > COLUMNS:
            yield f"{number}: over {COLUMNS} columns"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and lines[node.lineno - 1][:node.col_offset].strip():
            yield f"{node.lineno}: a statement in the middle of a line"
        named = isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr))
        if named and isinstance(node.value, ast.Lambda):
            yield f"{node.lineno}: a lambda with a name"
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST:
            yield f"{node.lineno}: {node.name} is longer than {LONGEST} lines"


def undocumented(text):
    """Public functions, classes and methods without a docstring, and the file itself."""
    tree = ast.parse(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in [tree, *tree.body, *(part for node in classes for part in node.body)]:
        if isinstance(node, DOCUMENTED) and not ast.get_docstring(node):
            name = getattr(node, "name", "the file")
            # forward and train are documented by torch's nn.Module.
            if not name.startswith("_") and name not in ("forward", "train"):
                yield name


@pytest.mark.parametrize("path", PRODUCT + TESTS, ids=lambda path: path.name)
def test_code_has_its_form(path):
    """Columns, statements, lambdas, functions; and no path of somebody's machine."""
    text = path.read_text(encoding="utf-8")
    assert not list(faults(text))
    assert path in TESTS or not list(undocumented(text))
    assert not re.search(r"/(?:home|root|work|Users)/\w", text)


@pytest.mark.parametrize("text", [
    "x = 1  # " + 100 * "-", "a = 1; b = 2", "if a: b", "é = 1; b = 2", "if a:\n    b\nelse: c",
    "f = lambda x: x", "(f := lambda: 1)", "def f():\n" + 60 * "    a\n"])
def test_a_rule_sees_what_it_forbids(text):
    assert list(faults(text))
    assert list(undocumented(text)) == ["the file", *["f"] * text.startswith("def")]


def test_the_chain_is_less_code_than_the_released_second_stage_alone():
    """At most 2,600 lines and 27,000 tokens, where that has 2,990 and 27,130."""
    lines, tokens, _ = zip(*map(measured, PRODUCT))
    assert sum(lines) <= 2600 and sum(tokens) <= 27000
    assert sum(measured(path)[0] for path in TESTS) <= 3500


# ========================================================================================== audit

def ledger():
    """(file that plain names belong to, {column: cell}) of every row of AUDIT.md's tables."""
    rows, head = [], None
    for line in AUDIT.splitlines():
        if line.startswith("#"):
            named = re.search(r"\(`(\S+\.py)`\)", line)
            file = named[1] if named else "stage2_weakclip.py"
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if head and cells and set(cells) != {"-"}:
            rows.append((file, dict(zip(head, cells, strict=True))))
        head = (head or cells) if cells else None
    return rows


LEDGER = ledger()
NUMBERS = [row["no."] for _, row in LEDGER]
FIELDS = [field.name for field in dataclasses.fields(Switches)]


@lru_cache(maxsize=None)
def names_in(file):
    """Functions, classes, constants, methods and fields of a file: "f", "Class.method"."""
    found = []

    def collect(body, prefix):
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            found.extend(prefix + target.id for target in targets if isinstance(target, ast.Name))
            if isinstance(node, DOCUMENTED):
                found.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
    collect(ast.parse((ROOT / file).read_text(encoding="utf-8")).body, "")
    return found


def test_the_ledger_is_short_and_every_row_has_a_number_of_its_own():
    assert len(AUDIT.encode()) <= 32_000
    assert len(LEDGER) > 150 and len(set(NUMBERS)) == len(NUMBERS) and set(CITED) <= set(NUMBERS)


def test_names_of_ours_exist():
    named = [(row["no."], place.rstrip(":") or file, name) for file, row in LEDGER
             for place, name in re.findall(r"`((?:[\w/]+\.py:)?)([A-Za-z_][\w.]*)`",
                                           row.get("ours", ""))]
    assert len(named) > 150 and not [row for row in named if row[2] not in names_in(row[1])]


def test_every_switch_has_its_row_with_the_presets_values():
    rows = {row["field"].strip("`"): row for _, row in LEDGER if "field" in row}
    assert list(rows) == FIELDS
    for preset, column in ((PAPER, "paper"), (RELEASED, "released")):
        told = {name: ast.literal_eval(row[column].split("`")[1]) for name, row in rows.items()}
        assert told == dataclasses.asdict(preset)


@pytest.mark.parametrize("paths", [PRODUCT, TESTS], ids=["sources", "tests"])
def test_equations_and_constants_are_cited(paths):
    """A number in brackets, or several, in a comment or docstring; 10 stands for 10a, 10b, 10c."""
    text = "\n".join(measured(path)[2] for path in paths)
    cites = re.findall(r"(?<!= )(?<!\w)\((E?\d+[a-d]?(?:, E?\d+[a-d]?)*)\)", text)
    found = set(", ".join(cites).split(", "))
    assert not [number for number in CITED if not found & {number, number.rstrip("abcd")}]
    assert not [number for number in found if re.search("[a-dE]", number) and number not in NUMBERS]


def test_every_parting_of_the_variants_has_its_marker():
    """`# RELEASED field, field: ...` names switches; PAPER and GUESS are in use."""
    remarks = "\n".join(measured(path)[2] for path in PRODUCT)
    marked = set(", ".join(re.findall(r"# RELEASED ((?:\w+, )*\w+):", remarks)).split(", "))
    parted = dataclasses.asdict(PAPER).items() - dataclasses.asdict(RELEASED).items()
    assert {name for name, _ in parted} <= marked <= set(FIELDS)
    assert "# PAPER" in remarks and "# GUESS" in remarks


# ========================================================================================== pages

def commands(page):
    """Shell commands of a page: in code blocks, and Python's between backticks in the text.

    What ° or the word "commit" follows was measured at a commit of former days.
    """
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)).splitlines()
    indented = re.findall(r"^    (python .*|pip .*)", text, re.M)
    inline = re.findall(r"`(?:\w+=\S+ )?((?:python|torchrun) [^`\n]+)`(?!°)", text)
    return [line for line in fenced + indented + inline if "commit" not in line]


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short_and_their_links_lead_somewhere(page):
    """At most so many words; links, and names such as `tests/toy.py`, are those of files."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(text.split()) <= PAGES[page]
    for link in re.findall(r"(?:\]\(|`(?=tests/\w+\.py`))([^)\s`]+)", text):
        assert "://" in link or (ROOT / link).exists() or ((ROOT / page).parent / link).exists()


@pytest.mark.parametrize("command", [line for page in PAGES for line in commands(page)])
def test_commands_parse(command):
    """A stage's by its own parse_args; what is in tests/ is there; the rest is of the shell."""
    words = shlex.split(command, comments=True)
    script = next((word for word in words if word.endswith(".py")), "")
    if not script:
        assert words[0] in ("pip", "mkdir", "printf", "cut") or words[:2] == ["python", "-m"]
    elif script.startswith("tests/"):
        assert (ROOT / script).is_file()
    else:
        module = importlib.import_module(script.removesuffix(".py"))
        options = [word for word in words[words.index(script) + 1:] if word != "..."]
        module.parse_args(options if "--data" in options else ["--data", "x", *options])
