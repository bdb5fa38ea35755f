"""The model card of an adapter: what it is, that `import peft_sparse` comes before it is loaded, and whom to cite.

PeftModel's `save_pretrained` leaves an empty form beside each adapter. It is filled in when the adapter's config is
saved, which is the last thing PEFT does, so whoever saves, a recipe, Trainer or a script, leaves a card.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from peft_sparse.checkpoint.card import MARK, may_replace
from peft_sparse.checkpoint.citations import CITATIONS, METHODS
from peft_sparse.checkpoint.labels import labels_of_head
from peft_sparse.checkpoint.lookup import adapter_settings
from peft_sparse.checkpoint.tasks import class_of_adapter
from peft_sparse.storage import may_be_on_the_hub
from peft_sparse.storage.files import SafetensorsFile
from peft_sparse.tuners.adapter_files import WEIGHTS
from peft_sparse.tuners.sparse_config import AFTER_SAVE

_SHOWN = ("r", "score_r", "spp_alpha", "importance", "weight_update", "pattern", "sparsity", "sparsity_pattern")
_ZEROS = {
    "pst": "It chooses which weights of its base model are zero: as many as its schedule had reached.",
    "spp": "Its base model is pruned, and a merge leaves all of its zeros where they are.",
}


def write_adapter_card(folder: Path) -> None:
    """Write README.md into the folder of a saved adapter of ours. Metadata that PEFT wrote stays, and so does a card
    that is somebody's own."""
    path = folder / "README.md"
    if not may_replace(path):
        return
    settings = adapter_settings(folder)
    method = str(settings["peft_type"]).lower()
    named = settings.get("base_model_name_or_path") or ""
    base = named if may_be_on_the_hub(named) and not Path(named).exists() else None
    data = ModelCard.load(path).data if path.is_file() else ModelCardData(library_name="peft")
    # A folder here says nothing to others, and the Hub refuses a card that names one.
    data.base_model = base
    known = [tag for tag in data.tags or () if base or not tag.startswith("base_model:")]
    data.tags = sorted({*known, "sparse", method, "peft-sparse"})
    on = f" on [{base}](https://huggingface.co/{base})" if base else ""
    parts = [
        f"---\n{data.to_yaml()}\n---\n{MARK}",
        f"# {method.upper()} adapter",
        f"An adapter{on}, trained with {METHODS[method]}. {_ZEROS[method]}",
        _settings_table(settings),
        _size(folder),
        "## How to load",
        _how_to_load(folder, settings, base),
        "## Citation",
        f"```bibtex\n{CITATIONS[method]}\n```",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


AFTER_SAVE.append(write_adapter_card)


def _settings_table(settings: dict[str, Any]) -> str:
    rows = [f"| `{name}` | {settings[name]} |" for name in _SHOWN if settings.get(name) not in (None, {})]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def _size(folder: Path) -> str:
    file = SafetensorsFile(folder / WEIGHTS)
    numbers = sum(math.prod(file.shape(name)) for name in file.header)
    return f"{WEIGHTS} has {numbers:,} numbers in {(folder / WEIGHTS).stat().st_size / 1e6:,.2f} MB."


def _how_to_load(folder: Path, settings: dict[str, Any], base: str | None) -> str:
    where = f'"{base}"' if base else '"the model that it was trained on"'
    labels = labels_of_head(folder)
    more = f", num_labels={labels}" if labels and settings.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ""
    model_cls = class_of_adapter(folder)
    if model_cls is not None:
        name = model_cls.__name__
        imports, loaded = f"from transformers import {name}\n", f"{name}.from_pretrained({where}{more})"
    else:  # not a class that can be imported by its name
        imports, loaded = "", "...  # the model that it was trained on"
    return (
        "```python\nimport peft_sparse  # makes the method known to PEFT; without it: KeyError: "
        f"'{settings['peft_type']}'\nfrom peft import PeftModel\n{imports}\nbase = {loaded}\n"
        'model = PeftModel.from_pretrained(base, "path or name of this repository")\n'
        "merged = model.merge_and_unload()  # the base model's class, with zeros in its weights\n```"
    )
