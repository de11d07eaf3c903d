"""Tests of notebooks/: they run from scratch, import the project, keep its symbols."""

import ast
import os
import re
import shutil
import unicodedata
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MODULES = sorted(ROOT.glob("*.py"))
MEGABYTE = 2**20
GREEK = dict(
    Delta="Δ", Lambda="Λ", beta="β", eta="η", gamma="γ", lambda_="λ", pi="π", tau="τ"
)
MARKS = {"hat": "\u0302", "tilde": "\u0303", "bar": "\u0304"}
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
trained = pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.stem >= "03"], ids=lambda path: path.stem
)


def read(path):
    return nbformat.read(path, as_version=4)


def sources(path, kind):
    return [cell.source for cell in read(path).cells if cell.cell_type == kind]


def headers():
    """Module docstrings and the symbols of the README, in one normal form."""
    texts = [ast.get_docstring(ast.parse(p.read_text())) or "" for p in MODULES]
    readme = (ROOT / "README.md").read_text()
    texts.append(readme.split("## Symbols")[1].split("\n## ")[0])
    return unicodedata.normalize("NFC", re.sub("[{}]", "", "\n".join(texts)))


def plain(latex):
    """A symbol as the headers write it: r"\\bar\\Lambda_p" becomes "Λ̄_p"."""
    text = re.sub(r"\\(?:mathrm|text)\{([^}]*)\}", r"\1", latex).replace("$", "")
    for name, letter in GREEK.items():
        text = text.replace("\\" + name.strip("_"), letter)
    for name, mark in MARKS.items():
        text = re.sub(rf"\\{name}\s*\{{?(\w)\}}?", rf"\1{mark}", text)
    text = text.replace("\\ ", " ").replace("{", "").replace("}", "")
    return unicodedata.normalize("NFC", text.strip())


def symbols(markdown):
    """First column of the table whose head is symbol | in code | meaning."""
    table = re.search(r"\| symbol \| in code .*\n\|[-| ]*\n((?:\|.*\n?)+)", markdown)
    column = [row.split(" | ")[0] for row in table[1].splitlines()] if table else []
    cells = [plain(cell.strip("| ")).split("=")[0].split(",") for cell in column]
    return [symbol.strip() for cell in cells for symbol in cell]


def known(symbol, text):
    return re.search(rf"(?<![\w\\]){re.escape(symbol)}(?!\w)", text) is not None


def redefined(code):
    """Functions and classes of the project that a notebook's code defines anew."""
    project = set()
    for path in MODULES:
        body = ast.parse(path.read_text()).body
        project |= {
            x.name for x in body if isinstance(x, ast.FunctionDef | ast.ClassDef)
        }
    own = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            own |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return own & project


@each
def test_a_notebook_is_short_executed_and_small(path):
    notebook = read(path)
    assert len(notebook.cells) <= 20
    assert path.stat().st_size <= MEGABYTE
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert any("assert " in cell.source for cell in cells)


@each
def test_a_notebook_defines_nothing_anew(path):
    assert not redefined("\n".join(sources(path, "code")))


@each
def test_symbols_and_tags_are_those_of_the_headers(path):
    markdown, text = "\n".join(sources(path, "markdown")), headers()
    found = symbols(markdown)
    assert found, "no table of symbols"
    assert not [s for s in found if not known(s, text)]
    tags = re.findall(r"\\tag\{([^}]*)\}", markdown)
    tags += re.findall(r"\(([A-Z]+[0-9]? \d+)\)", "\n".join(sources(path, "code")))
    assert tags and not [tag for tag in tags if f"({tag})" not in text]


def test_the_checks_above_would_notice():
    assert redefined("def symlog(x): pass") == {"symlog"}
    assert redefined("train = lambda: 0") == {"train"}
    assert plain(r"$\bar\Lambda,\ r_\mathrm{nov}$") == unicodedata.normalize(
        "NFC", "Λ\u0304, r_nov"
    )
    assert plain(r"$\hat S$") == "Ŝ" and plain(r"$K_i = k^i$") == "K_i = k^i"
    table = (
        "| symbol | in code | meaning |\n|---|---|---|\n| $q,\\ \\tau$ | `q` | x |\n"
    )
    assert symbols(table) == ["q", "τ"]
    assert known("Λ", "of Λ, and") and not known("Λ", "Λx") and not known("ξ", "x")


def execute(path, folder):
    """Runs a notebook in a folder of its own kernel; raises what its cells raise."""
    # Tests compile without optimisation (conftest.py): here loops are long.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env["PYTHONPATH"] = str(ROOT)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(read(path), timeout=900, resources=resources)
    client.execute(env=env)


@each
def test_a_notebook_runs_from_scratch(path):
    execute(path, FOLDER)


@pytest.fixture(scope="module")
def no_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "results", folder / "results")
    (folder / "notebooks").mkdir()
    return folder / "notebooks"


@pytest.mark.slow
@trained
def test_without_weights_a_small_agent_is_trained_in_place(path, no_weights):
    execute(path, no_weights)
    assert (no_weights.parent / "runs" / "notebooks" / "result.json").exists()
