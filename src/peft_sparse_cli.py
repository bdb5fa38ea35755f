"""The command `peft-sparse`, started quickly.

`import peft_sparse` brings torch, transformers and PEFT with it, some seconds that `--help` and a mistyped option
should not take. So the package's own `__init__` runs once the command line is parsed, and this module lies outside of
the package, since importing anything inside would run it first. What the commands are is in `peft_sparse/cli/`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if "peft_sparse" in sys.modules:  # in a process that uses the package already
        from peft_sparse.cli.main import main as run

        return run(argv)
    spec = importlib.util.find_spec("peft_sparse")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["peft_sparse"] = package
    from peft_sparse.cli import main as front

    return front.main(argv, before_running=lambda: spec.loader.exec_module(package))


if __name__ == "__main__":
    sys.exit(main())
