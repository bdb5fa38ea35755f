"""Run the notebooks on the models of `make demo` and store in each what it prints: `make notebooks`.

    python notebooks/execute.py [NAME ...]

What a reader sees in the repository is so what somebody's CPU has computed. Cells run in order, in one process and in
a temporary folder, with a fixed number of threads. Left out is what differs from run to run or is no result: progress
bars, warnings of libraries (both go to stderr), and the lines with the seconds that a Trainer took.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("PEFT_SPARSE_SHARED", HERE.parents[1] / "shared"))
CACHE = HERE.parent / "outputs" / "demo"  # where the demo keeps the language model, as floats
THREADS = 1  # so that sums are formed in one order, on any machine
NAMES = ("quickstart", "spp_causal_lm", "pst_classification")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"default: {' '.join(NAMES)}")
    for name in parser.parse_args().names:
        path = HERE / f"{name}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        with environment(name), tempfile.TemporaryDirectory() as folder:
            here = os.getcwd()
            os.chdir(folder)
            try:
                execute(notebook)
            finally:
                os.chdir(here)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path.name}: stored", file=sys.stderr)


@contextlib.contextmanager
def environment(name: str) -> Any:
    """The variables that the notebooks read: the demo's models, and SST-2 where it lies beside the repository."""
    from peft_sparse.cli._demo_data import encoder_folder, language_model_folder

    model = encoder_folder() if name == "pst_classification" else language_model_folder(CACHE)
    values = {"MODEL": str(model)}
    if (SHARED / "data/glue/sst2/dev.jsonl").is_file():
        values["SST2"] = str(SHARED / "data/glue/sst2")
    os.environ.update(values)
    try:
        yield
    finally:
        for variable in values:
            del os.environ[variable]


def execute(notebook: dict[str, Any]) -> None:
    """Run the code cells and replace their outputs."""
    import matplotlib

    matplotlib.use("agg")
    scope: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, 1):
        cell["execution_count"] = count
        cell["outputs"] = run_cell("".join(cell["source"]), scope, count)


def run_cell(source: str, scope: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Outputs as Jupyter stores them: what was printed, pictures, and the value of a last expression."""
    from matplotlib import pyplot

    body = ast.parse(source).body
    last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"cell {count}", "exec"), scope)
        value = None if last is None else eval(compile(last, f"cell {count}", "eval"), scope)
    outputs: list[dict[str, Any]] = []
    if text := [line for line in printed.getvalue().splitlines(keepends=True) if "_runtime': " not in line]:
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    for number in pyplot.get_fignums():
        data = {"image/png": picture(pyplot.figure(number)), "text/plain": ["<Figure>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    pyplot.close("all")
    if value is not None:
        result = {"data": {"text/plain": repr(value).splitlines(keepends=True)}, "metadata": {}}
        outputs.append(result | {"execution_count": count, "output_type": "execute_result"})
    return outputs


def picture(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    # before torch and tqdm are there to read them
    os.environ |= {"OMP_NUM_THREADS": str(THREADS), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    main()
