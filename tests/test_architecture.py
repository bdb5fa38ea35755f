"""The folder list is the architecture: a room imports only from rooms below it, and no file grows into two rooms.

The imports are read from the source, so those inside functions and under TYPE_CHECKING count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "peft_sparse"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE
FILES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 300

# From top to bottom. A new room gets its place here, and a row in CONTRIBUTING.md.
ROOMS = (
    "__main__",
    "__init__",
    "cli",
    "training",
    "inference",
    "checkpoint",
    "evaluation",
    "pruning",
    "tuners",
    "_peft",
    "storage",
    "linears",
    "ops",
    "sparsity",
    "native",
    "_switch",
    "_graphs",
)

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(SOURCE).as_posix())


def room_of(module: str) -> str:
    """The room of a dotted name: `peft_sparse.ops.spp` and `peft_sparse.ops` are in ops.

    A first part that is no room is a public name of the package, hence of `__init__`.
    """
    first = module.split(".")[1] if "." in module else "__init__"
    return first if first in ROOMS else "__init__"


def imported_rooms(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """(room, line) of each import of our own package; relative imports start from the dotted name `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # one dot is the package itself, each further dot one level up
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == PACKAGE:
                yield room_of(module), node.lineno


def rooms_above(room: str, tree: ast.AST, package: str) -> list[str]:
    """What a file of `room` imports against the order; siblings within a room may import each other."""
    return [
        f"line {line}: {room} imports from {other}, which is above it"
        for other, line in imported_rooms(tree, package)
        if ROOMS.index(other) < ROOMS.index(room)
    ]


@each_file
def test_imports_point_downward(file: Path):
    path = file.relative_to(SOURCE)
    room = path.parts[0].removesuffix(".py")
    assert room in ROOMS, f"{room} is not a room; see `ROOMS` in this file and section 'Rooms' of CONTRIBUTING.md"
    package = ".".join([PACKAGE, *path.parent.parts])
    assert not rooms_above(room, ast.parse(file.read_text(encoding="utf-8")), package)


@each_file
def test_file_is_short(file: Path):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines, more than {MAX_LINES}: usually two rooms in one file"


@each_file
def test_file_says_what_it_is_for(file: Path):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), "no docstring at the top of the file"


@each_file
def test_text_files_name_their_encoding(file: Path):
    """Else it is the locale's: UTF-8 on most machines, and not on Windows before Python 3.15."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("read_text", "write_text"):
            assert any(keyword.arg == "encoding" for keyword in node.keywords), f"line {node.lineno}"


@pytest.mark.parametrize(
    "statement",
    [
        "import peft_sparse",
        "import peft_sparse.tuners.pst",
        "from peft_sparse import PstConfig",
        "from peft_sparse import tuners",
        "from peft_sparse.pruning.wanda import prune_wanda",
        "from .. import tuners",
        "from .. import PstConfig",
        "from ..tuners.pst import PstLayer",
        "def f():\n    from ..cli import main",
        "if TYPE_CHECKING:\n    from peft_sparse.training import finetune",
    ],
)
def test_a_climbing_import_is_seen(statement: str):
    assert rooms_above("ops", ast.parse(statement), "peft_sparse.ops")


@pytest.mark.parametrize(
    "statement",
    [
        "import torch, peft",
        "import peft_sparse.sparsity",
        "from peft_sparse import sparsity",
        "from ..sparsity.masks import topk_mask",
        "from . import reference",
        "from .reference import pst_linear",
    ],
)
def test_a_falling_or_level_import_passes(statement: str):
    assert not rooms_above("ops", ast.parse(statement), "peft_sparse.ops")
