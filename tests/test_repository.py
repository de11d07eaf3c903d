"""Guards of the repository: lists of modules agree, nothing private or big is in it."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
TAG = re.compile(r"\(([A-Z][A-Z0-9]* \d{1,2})\)")
COMMENT = re.compile(r"#\s*\(([^()]*\d)\)\s*$", re.MULTILINE)
MEGABYTE = 2**20
FORBIDDEN = {
    "package registry": re.compile(
        r"\b(pypi[.]org|pythonhosted[.]org|anaconda[.]org|npmjs[.]org|crates[.]io"
        r"|download[.]pytorch[.]org|pypi[.]python[.]org|pypi[.]nvidia[.]com)",
        re.IGNORECASE,
    ),
    "home folder": re.compile(
        r"(?<![\w.])/(home|Users)/\w|(?<![\w./])/roo[t]/\w|C:\\Users"
    ),
}


def files():
    """Files that are tracked or would be by `git add .`; skips outside of git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in run.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_modules_with_shape_checks_are_the_root_modules():
    options = settings()["tool"]["pytest"]["ini_options"]["addopts"]
    (packages,) = re.findall(r"--jaxtyping-packages=(\S+)", options)
    *hooked, checker, name = re.split(r"[,.]", packages)
    assert (checker, name) == ("beartype", "beartype")
    assert sorted(hooked) == MODULES


def test_installed_modules_are_the_root_modules():
    assert sorted(settings()["tool"]["setuptools"]["py-modules"]) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_tags_in_a_module_stand_in_its_docstring(module):
    """Every equation that code cites, in comments and docstrings alike."""
    source = (ROOT / f"{module}.py").read_text()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    defined, cited = set(TAG.findall(docstring)), set(TAG.findall(source))
    assert cited <= defined, f"not in the docstring: {sorted(cited - defined)}"
    odd = [tag for tag in COMMENT.findall(source) if tag not in defined]
    assert not odd, f"comments that look like tags: {odd}"


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_no_text_names_what_belongs_to_one_machine(kind):
    found = []
    for path in files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for line in content.decode().splitlines():
            if FORBIDDEN[kind].search(line):
                found.append(f"{path.relative_to(ROOT)}: {line.strip()[:100]}")
    assert not found


def test_the_guards_above_would_notice():
    dot, slash = ".", "/"
    bad = {
        "package registry": [
            f"see pypi{dot}org/simple",
            f"files.pythonhosted{dot}org",
        ],
        "home folder": [
            f'open("{slash}home/me/x")',
            f"cd {slash}root/work",
            f"{slash}Users/me",
        ],
    }
    good = ["tests/home/x", f"runs{slash}root/x", "https://example.org/home", "a/b"]
    assert bad.keys() == FORBIDDEN.keys()
    for kind, lines in bad.items():
        assert all(FORBIDDEN[kind].search(line) for line in lines)
        assert not any(FORBIDDEN[kind].search(line) for line in good)
    tags = "x = 1  # (S5 2)\ny = f(x)  # (SUB 10)\nGu et al. (ICLR 2023)"
    assert TAG.findall(tags) == ["S5 2", "SUB 10"]
    assert COMMENT.findall(tags) == ["S5 2", "SUB 10"]


def test_no_file_is_larger_than_five_megabytes():
    sizes = {str(path): path.stat().st_size for path in files()}
    assert max(sizes.values()) < 5 * MEGABYTE


def test_readme_lists_the_modules_in_import_order():
    """A module imports only from those above it; line counts are near the truth."""
    rows = re.findall(
        r"^\| \[(\w+)\.py\]\(\1\.py\) .* \| (\d+) \|(?: .* \|)?$",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    names = [name for name, _ in rows]
    assert sorted(names) == sorted(path.stem for path in ROOT.glob("*.py"))
    for place, (name, lines) in enumerate(rows):
        text = (ROOT / f"{name}.py").read_text()
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) & set(names)
        assert imported <= set(names[:place]), f"{name} imports from below"
        assert abs(len(text.splitlines()) - int(lines)) <= 10, name


def test_readme_lists_the_differences_that_module_headers_name():
    rows = re.findall(r"^\| (Δ\d+) \|", (ROOT / "README.md").read_text(), re.M)
    header = r"Differs from the official code in:(.+?)\n\n"
    texts = [path.read_text() for path in ROOT.glob("*.py")]
    named = [one for text in texts for one in re.findall(header, text, re.S)]
    assert len(set(rows)) == len(rows)
    assert set(rows) == set(re.findall(r"Δ\d+", " ".join(named)))


def test_readme_links_each_notebook_beside_a_module_it_imports():
    rows = re.findall(
        r"^\| \[(\w+)\.py\].*\[(\d\d)\]\((notebooks/\2_\w+\.ipynb)\) \|$",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    notebooks = ROOT.glob("notebooks/*.ipynb")
    linked = sorted(path for _, _, path in rows)
    assert linked == sorted(str(path.relative_to(ROOT)) for path in notebooks)
    for module, _, path in rows:
        assert re.search(
            rf"(from|import) {module}\b|{module}\.py", (ROOT / path).read_text()
        ), path


def test_links_between_documents_lead_somewhere():
    """Files named in Markdown exist; so do the headings named after a `#`."""
    slug = lambda title: re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    headings = lambda path: {
        slug(title) for title in re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    }
    for document in [path for path in files() if path.suffix == ".md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if "://" in link:
                continue
            name, _, heading = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), f"{document.name}: {link}"
            assert not heading or heading in headings(target), (
                f"{document.name}: {link}"
            )


def test_first_figure_is_what_its_script_draws_and_names_files_that_exist(tmp_path):
    """The words of both; outlines of letters may differ between matplotlib versions."""
    script, drawn = ROOT / "docs" / "tower.py", tmp_path / "tower.svg"
    subprocess.run([sys.executable, str(script), str(drawn)], check=True)
    words = lambda path: re.findall(r"<!-- (.+?) -->", path.read_text())
    assert words(drawn) == words(script.with_suffix(".svg"))
    named = set(re.findall(r"(\w+)\.py", " ".join(words(drawn))))
    assert {"s5", "s5wm", "subactor", "etbs", "hieros"} <= named <= set(MODULES)
    assert "docs/tower.svg" in (ROOT / "README.md").read_text()
