"""How many labels a classifier tells apart, as its files say it.

transformers writes no names of labels for two of them, its default, and reads two where there are none; but BART's
default is three, so that one with two would not fit its own config.json. And an adapter has no config.json of a model:
the number is the height of the head that was saved with it, and the names are in the adapter's config.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from peft_sparse.storage.files import SafetensorsFile
from peft_sparse.tuners.adapter_files import WEIGHTS

# The last linear of the heads of transformers' classifiers, by the ends of names: most of them; RoBERTa's and others';
# BART's and T5's; Funnel's; decoders'; XLNet's; XLM's.
_HEADS = (
    "classifier.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
    "classifier.linear_out.weight",
    "score.weight",
    "logits_proj.weight",
    "sequence_summary.summary.weight",
)


def keep_labels(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's labels into the config.json that its `save_pretrained` wrote, where it would be read with
    another number of them."""
    config = model.config
    if type(config).from_pretrained(folder).num_labels == config.num_labels:
        return
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written |= {"id2label": config.id2label, "label2id": config.label2id}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def named_labels(names: Sequence[str]) -> dict[str, Any]:
    """What a model's config has for labels of these names, in the order of their numbers."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def labels_of_head(folder: str | Path) -> int | None:
    """How many labels the head that was saved with an adapter tells apart; None if there is no such head."""
    return rows_in_adapter(folder, _HEADS)


def rows_in_adapter(folder: str | Path, names: str | tuple[str, ...]) -> int | None:
    """Rows of the tensor that was saved with an adapter under one of these names, or ends of them; None if there is
    none."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        return None
    file = SafetensorsFile(path)
    return next((file.shape(name)[0] for name in file.header if name.endswith(names)), None)
