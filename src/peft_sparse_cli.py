"""The command `peft-sparse`, started quickly, and ended quickly by Ctrl-C.

`import peft_sparse` brings torch, transformers and PEFT with it, some seconds that `--help` and a mistyped option
should not take. So the package's own `__init__` runs once the command line is parsed, and this module lies outside of
the package, since importing anything inside would run it first. What the commands are is in `peft_sparse/cli/`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if "peft_sparse" in sys.modules:  # in a process that uses the package already
        from peft_sparse.cli.main import main as run

        return run(argv)
    # While libraries are imported, and when the process ends, an exception goes wherever their code lets it, and there
    # is nothing to tidy: Ctrl-C ends the process at once. In between `front.main` has an answer to it.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # which `nohup` and a shell's `&` ask for
        signal.signal(signal.SIGINT, _leave)
    import importlib.util  # after that, as all that takes time

    spec = importlib.util.find_spec("peft_sparse")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["peft_sparse"] = package
    from peft_sparse.cli import main as front

    return front.main(argv, before_running=lambda: spec.loader.exec_module(package))


def _leave(*_: Any) -> NoReturn:
    os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
