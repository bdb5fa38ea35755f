"""The guides are true: the code blocks of each page run, in order, on tiny models of the same classes; and so do the
examples of docstrings."""

import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import peft_sparse

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = {f"notebooks/{path.stem}.md" for path in ROOT.glob("notebooks/*.ipynb")}  # by .ci/notebook_pages.py
MODULES = [
    module.name
    for module in pkgutil.walk_packages(peft_sparse.__path__, "peft_sparse.")
    if not module.name.endswith("__main__") and (importlib.util.find_spec("triton") or "triton" not in module.name)
]
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python" in page.read_text())


@pytest.mark.filterwarnings("ignore")  # tiny models, trained for a few steps
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_blocks_run(page, hub_stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for name, folder in hub_stand_ins.items():
            block = block.replace(f'"{name}"', repr(folder))
        block = re.sub(r"max_steps=\d+", "max_steps=3", block)
        exec(compile(block, page.name, "exec"), scope)
    assert os.listdir(tmp_path)  # every guide leaves a file: a model that somebody wants


@pytest.mark.parametrize("name", [*MODULES, "benchmarks.leaderboard.search"])
def test_examples_of_docstrings_run(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0, f"{found.failed} of {found.attempted} examples say something else"


def test_there_are_examples_in_docstrings():
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(tests) > 40


def test_all_pages_are_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", str(navigation)))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | NOTEBOOKS


def test_links_lead_somewhere():
    """Of all pages in the repository, to files and to headings."""
    folders = [ROOT / folder for folder in ("benchmarks", "configs", "docs")]
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]
    found = 0
    for page in pages:
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
            if target.endswith(".png") and "results" in page.parts:
                continue  # the source archive leaves these out
            file = page.parent / target if target else page
            assert file.exists() or target in NOTEBOOKS, f"{page.name}: {target}"
            assert not heading or heading in anchors(file), f"{page.name}: {target}#{heading}"
            found += 1
    assert found > 100


def anchors(page):
    """Those of a page's headings, as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_reference_has_all_public_names():
    names = set(re.findall(r"::: peft_sparse\.(\w+)", (DOCS / "reference" / "index.md").read_text()))
    made_by_peft = {"PstModel", "SppModel"}  # from the configs
    assert names == set(peft_sparse.__all__) - made_by_peft - {"__version__"}


def test_make_docs_counts_warnings():
    """mkdocs drops its warnings with -q, before `strict` sees them."""
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"mkdocs build$", makefile, re.MULTILINE)
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["strict"] is True
