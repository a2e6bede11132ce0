"""AUDIT.md against the sources: what it names exists, switches and their values are all there, markers name switches.

Sources and tests are parsed, not run.
"""
import ast
import dataclasses
import io
import re
import tokenize
from functools import lru_cache

import pytest

from conftest import ROOT
from stage2_weakclip import PAPER, RELEASED, Switches

AUDIT = (ROOT / "AUDIT.md").read_text(encoding="utf-8")
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("clip/*.py")])
FIELDS = {f.name: f for f in dataclasses.fields(Switches)}
FINDINGS = set(range(1, 35))
CLIP_ES_FINDINGS = set(range(1, 25))  # of CLIP-ES's code, numbered E1, E2, ...
CODE = r"`((?:clip/)?\w+\.py):([A-Za-z_][\w.]*)`"
TEST = r"`(test_\w+)::(\w+)`"  # `test_parity::test_eval` is test_eval of tests/test_parity.py


def tables():
    """[(heading, column names, rows as {column: cell})] of AUDIT.md."""
    found, heading = [], ""
    for block in re.split(r"\n\s*\n", AUDIT):
        for line in block.splitlines():
            if line.startswith("#"):
                heading = line.lstrip("# ")
        lines = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines() if line.startswith("|")]
        if lines:
            head, rows = lines[0], lines[2:]
            assert rows and all(len(r) == len(head) for r in rows), f"{heading}: a row has another number of cells than {head}"
            found.append((heading, head, [dict(zip(head, r)) for r in rows]))
    return found


TABLES = tables()
SWITCH_ROWS = {row["field"].strip("`"): row for _, head, rows in TABLES if "field" in head for row in rows}


@lru_cache(maxsize=None)
def parsed(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def find(path, name):
    """The node of a function, class, method or constant of a source file; None where there is none."""
    node = parsed(path)
    for part in name.split("."):
        for child in node.body if hasattr(node, "body") else ():
            targets = getattr(child, "targets", [getattr(child, "target", None)])
            names = [getattr(t, "id", None) for t in targets] + [getattr(child, "name", None)]
            if part in names:
                node = child
                break
        else:
            return None
    return node


def remarks(path):
    """(line number, text) of all comments and docstrings."""
    text = (ROOT / path).read_text(encoding="utf-8")
    out = [(t.start[0], t.string) for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            start = node.body[0].lineno
            out += [(start + k, line) for k, line in enumerate(node.body[0].value.value.splitlines())]
    return sorted(out)


REMARKS = [(f"{path.relative_to(ROOT)}:{n}", text) for path in SOURCES for n, text in remarks(path.relative_to(ROOT))]
LEGENDS = [where for where, text in REMARKS if all(m in text for m in ("# PAPER", "# RELEASED", "# GUESS"))]


# ================================================================================================================= names

def test_tables_are_read():
    assert len(TABLES) >= 15 and len(SWITCH_ROWS) >= 18 and len(re.findall(CODE, AUDIT)) > 100


@pytest.mark.parametrize("path, name", sorted(set(re.findall(CODE, AUDIT))))
def test_named_code_exists(path, name):
    assert (ROOT / path).is_file() and find(path, name), f"AUDIT.md names {path}:{name}"


@pytest.mark.parametrize("module, name", sorted(set(re.findall(TEST, AUDIT))))
def test_named_tests_exist(module, name):
    path = f"tests/{module}.py"
    assert (ROOT / path).is_file(), f"AUDIT.md names {module}::{name}"
    assert name.startswith("test_") and isinstance(find(path, name), ast.FunctionDef), f"AUDIT.md names {module}::{name}"


def test_every_citation_of_a_test_is_in_the_form_that_is_checked():
    """What looks like a test in any other form, the former `tests/test_x.py::test_y` too, would go unchecked."""
    assert len(re.findall(TEST, AUDIT)) > 150
    assert not re.findall(r"\S*::\S*", re.sub(TEST, "", AUDIT))


@pytest.mark.parametrize("heading, head, rows", TABLES, ids=[t[0] for t in TABLES])
def test_rows_name_code_and_tests(heading, head, rows):
    """A row says where ours is and which test holds it, or plainly "-"."""
    for row in rows:
        if "ours" in head:
            assert re.search(CODE, row["ours"]), f"{heading}: no function of ours in {row}"
            assert row["test"] == "-" or re.search(TEST, row["test"]), f"{heading}: neither a test nor - in {row}"
            rest = re.sub(TEST, "", re.sub(CODE, "", row["ours"] + row["test"]))
            assert not re.search(r"\.py|\btest_", rest), f"{heading}: a reference that is not `file.py:name` or `test_file::test`: {rest}"


# ============================================================================================================== switches

def test_every_switch_has_a_row_and_every_row_a_switch():
    assert list(SWITCH_ROWS) == list(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("column, preset", [("paper", PAPER), ("released", RELEASED)])
def test_values_are_those_of_the_presets(field, column, preset):
    value = re.match(r"`([^`]+)`", SWITCH_ROWS[field][column])
    assert value and ast.literal_eval(value[1]) == getattr(preset, field), f"{field}: AUDIT.md says {SWITCH_ROWS[field][column]}"


@pytest.mark.parametrize("field", FIELDS)
def test_the_code_of_a_switch_reads_it(field):
    nodes = [find(*ref) for ref in re.findall(CODE, SWITCH_ROWS[field]["ours"])]
    read = {n.attr for node in nodes if node for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    assert field in read, f"none of {SWITCH_ROWS[field]['ours']} reads {field}"


# ============================================================================================================== findings

def numbered():
    """Numbers of findings about WeakCLIP's code that have a row."""
    return {int(n) for _, _, rows in TABLES for row in rows for n in re.findall(r"\b\d+", row["no."])}


def test_every_finding_has_a_row():
    assert numbered() == FINDINGS


def test_numbers_in_the_sources_are_findings():
    cited = {(where, int(n)) for where, text in REMARKS for m in re.findall(r"\((\d{1,2}(?:, \d{1,2})*)\)", text) for n in m.split(", ")}
    assert len(cited) > 15
    assert not [c for c in sorted(cited) if c[1] not in FINDINGS]


def test_every_finding_about_clip_es_has_a_row_of_its_own():
    numbers = [row["no."] for _, _, rows in TABLES for row in rows if row["no."].startswith("E")]
    assert numbers == [f"E{n}" for n in sorted(CLIP_ES_FINDINGS)]


def test_clip_es_numbers_in_the_sources_are_findings():
    """(E11), or several: (E1, E2); each finding that ours has code for is cited there."""
    cited = set()
    for where, text in REMARKS:
        for match in re.findall(r"\((E\d+(?:, E\d+)*)\)", text):
            cited.update((where, int(n)) for n in re.findall(r"\d+", match))
    assert not [c for c in sorted(cited) if c[1] not in CLIP_ES_FINDINGS]
    numbers = {n for _, n in cited}
    assert {n for n in range(1, 19)} <= numbers and 21 in numbers


# =============================================================================================================== markers

@pytest.mark.parametrize("marker", ["PAPER", "RELEASED", "GUESS"])
def test_markers_are_in_use(marker):
    assert [where for where, text in REMARKS if re.search(rf"\b{marker}\b", text) and where not in LEGENDS]


def released_markers():
    """(place, what stands behind the word) of every marker; not the legends, and not the preset of that name."""
    for where, text in REMARKS:
        if where not in LEGENDS and "#" in text:
            yield from ((where, m) for m in re.findall(r"\bRELEASED\b:?\s+([^#]*)", text))


def test_released_markers_name_switches():
    """`# RELEASED field: ...` or `# RELEASED field, field: ...`."""
    wrong = [f"{where}: RELEASED {text.strip()}" for where, text in released_markers()
             if not set(re.split(r",\s*", text.partition(":")[0].strip())) <= set(FIELDS)]
    assert not wrong, "\n".join(wrong)


def test_every_parting_has_a_marker():
    marked = {name for _, text in released_markers() for name in re.split(r",\s*", text.partition(":")[0].strip())}
    assert {n for n in FIELDS if getattr(PAPER, n) != getattr(RELEASED, n)} <= marked
