"""The model card of a sparse checkpoint: what was measured on its files, how to load it, and whom to cite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from peft_sparse.checkpoint.citations import CITATIONS, METHODS, PRUNERS
from peft_sparse.evaluation import LayerSparsity, sparsity_report
from peft_sparse.evaluation.tables import shape_cell
from peft_sparse.storage import CONFIG_KEY, StoredModel, facts_of, open_model
from peft_sparse.storage.model import transformers_class
from peft_sparse.storage.origin import BASE_MODEL, METHOD, PRUNING

# A README.md without this is somebody's own and stays as it is, unless it is the empty form of transformers and PEFT.
MARK = "<!-- written by peft_sparse; remove this line to keep your changes when the model is saved again -->"
_FORM = ("# Model Card for Model ID", "[More Information Needed]")


def write_model_card(folder: str | Path, base_model: str | None = None, method: str | None = None) -> Path:
    """Write README.md into a folder with a model, dense or packed; every number in it is measured on the files.

    Args:
        folder: where `save_pretrained` or [`save_sparse`] wrote to.
        base_model: what it was made from, as a name on the Hub; None: what config.json says.
        method: by which it was tuned, `"pst"` or `"spp"`; None: what config.json says, which also says how it was
            pruned. The card names what is known, and cites the papers of that.

    Returns:
        The path of the card. An existing one that this function did not write is left alone.

    Raises:
        ValueError: if there is no model, or another `method`.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(config).save_pretrained(folder)
        ...     card = write_model_card(folder, method="spp").read_text(encoding="utf-8")
        >>> [line for line in card.splitlines() if line.startswith("#")]
        ['# Sparse model', '## Measured sparsity', '## Size', '## How to load', '## Citation']
    """
    check_method(method)
    path = Path(folder) / "README.md"
    stored = open_model(Path(folder))
    if may_replace(path):
        facts = facts_of(stored.config.get(CONFIG_KEY))
        method = method or facts.get(METHOD)
        check_method(method)
        card = _card(stored, base_model or facts.get(BASE_MODEL), method, _pruners(facts.get(PRUNING)))
        path.write_text(card, encoding="utf-8")
    return path


def may_replace(card: Path) -> bool:
    """Whether a README.md is not there, or nobody's own."""
    if not card.is_file():
        return True
    text = card.read_text(encoding="utf-8", errors="replace")
    return MARK in text or all(part in text for part in _FORM)


def check_method(method: str | None) -> None:
    """Raises:
    ValueError: for a method that no card can name."""
    if method is not None and method not in METHODS:
        raise ValueError(f"`method` is one of {sorted(METHODS)} or None, got {method!r}.")


def _pruners(facts: Any) -> list[str]:
    """The pruners of a model by the facts in its config, in the order in which they ran."""
    if not isinstance(facts, dict):
        return []
    names = [run.get("method") for run in (*facts.get("earlier", ()), facts)]
    return [name for name in dict.fromkeys(names) if name in PRUNERS]


def _card(stored: StoredModel, base_model: str | None, method: str | None, pruners: list[str]) -> str:
    report = sparsity_report(stored.folder)
    data = ModelCardData(
        base_model=base_model,
        library_name="peft-sparse" if stored.layout == "packed" else "transformers",
        tags=["sparse", "pruned", *([method] if method else []), "peft-sparse"],
    )
    origin = f" made from [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    how = f", pruned with {' and '.join(PRUNERS[name] for name in pruners)}" if pruners else ""
    how += f", tuned with {METHODS[method]}" if method else ""
    cited = [*pruners, *([method] if method else [])]
    parts = [
        f"---\n{data.to_yaml()}\n---\n{MARK}",
        "# Sparse model",
        f"A sparse {(stored.config.get('architectures') or ['model'])[0]}{origin}{how}. "
        f"{report.total_sparsity:.2%} of the weights in the linears of its transformer blocks are zero "
        f"(pattern: {report.pattern}).",
        "## Measured sparsity",
        _sparsity_table(report.layers),
        "## Size",
        _size_table(stored),
        "## How to load",
        _how_to_load(stored),
    ]
    if cited:
        parts += ["## Citation", *(f"```bibtex\n{CITATIONS[name]}\n```" for name in cited)]
    return "\n\n".join(parts) + "\n"


def _sparsity_table(layers: list[LayerSparsity]) -> str:
    """A row for each kind of linear: those of the same name in all blocks."""
    kinds: dict[str, list[LayerSparsity]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.split(".")[-1], []).append(layer)
    lines = ["| module | layers | zeros | sparsity | pattern |", "| --- | --- | --- | --- | --- |"]
    for kind, found in kinds.items():
        zeros, numel = sum(layer.zeros for layer in found), sum(layer.numel for layer in found)
        patterns = ", ".join(sorted({layer.pattern for layer in found}))
        shapes = shape_cell([layer.shape for layer in found])
        lines.append(f"| {kind} | {shapes} | {zeros:,} | {zeros / max(numel, 1):.2%} | {patterns} |")
    return "\n".join(lines)


def _size_table(stored: StoredModel) -> str:
    paths = {tensor.data.file.path for tensor in stored.tensors.values()}
    files = sum(path.stat().st_size for path in paths)
    dense = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in stored.tensors.values())
    return (
        f"The weights take {files / 1e6:,.1f} MB on disk; as plain dense tensors they take {dense / 1e6:,.1f} MB "
        f"({files / max(dense, 1):.1%})."
    )


def _how_to_load(stored: StoredModel) -> str:
    name = (stored.config.get("architectures") or ["AutoModel"])[0]
    known = transformers_class(name) is not None or name.startswith("Auto")
    where = '"path or name of this repository"'
    if stored.layout == "packed":
        more = ""
        if not known:
            more = ", trust_remote_code=True" if "auto_map" in stored.config else f", model_cls={name}"
        code = f"from peft_sparse import load_sparse\n\nmodel = load_sparse({where}{more})"
        return (
            f"```python\n{code}\n```\n\nThe zeros are not stored, so that plain transformers cannot read these files; "
            "`load_sparse(..., packed=True)` also keeps them packed in memory."
        )
    if known:
        code = f"from transformers import {name}\n\nmodel = {name}.from_pretrained({where})"
    else:
        code = (
            f"from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained({where}, trust_remote_code=True)"
        )
    return f"```python\n{code}\n```"
