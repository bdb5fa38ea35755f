"""What is published: a source archive that the tests run from, and a wheel with what the package reads and no more."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "benchmarks", "configs", "docs", "notebooks", "src", "tests")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md")
FILES += ("mkdocs.yml", "pyproject.toml", "setup.cfg")
BUILD = "from setuptools import build_meta; build_meta.build_sdist('../dist'); build_meta.build_wheel('../dist')"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the repository, or of the unpacked archive: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("packaging") / "source"
    made = shutil.ignore_patterns("__pycache__", "*.egg-info", ".ipynb_checkpoints")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=made)
    for file in FILES:
        shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def built(source: Path) -> Path:
    """The folder with both."""
    out = source.parent / "dist"
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_source_archive_has_all_that_tests_read(source, built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {file.relative_to(source).as_posix() for folder in FOLDERS for file in (source / folder).rglob("*.*")}
    plots = {name for name in files if name.startswith("benchmarks/results/") and name.endswith(".png")}
    made = {name for name in files if ".egg-info" in name}
    assert (files - plots - made) | set(FILES) <= names
    assert not plots & names and not any(name.endswith(".pyc") for name in names)


def test_wheel_has_the_package_alone(source, built):
    (path,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(path).namelist())
    ours = {name for name in names if ".dist-info/" not in name}
    code = {file.relative_to(source / "src").as_posix() for file in (source / "src").rglob("*.*") if file.is_file()}
    assert ours == {name for name in code if ".egg-info" not in name}
    assert {name.rpartition(".")[2] for name in ours} == {"py", "typed", "c", "h"}
