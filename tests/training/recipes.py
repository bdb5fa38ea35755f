"""Recipes for tiny models, which tests of `finetune` run."""

import json

from peft_sparse.training import make_recipe

from models import save_with_tokenizer, tiny_bert, tiny_llama


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def recipe(tmp_path, model, rows, name="run", **parts):
    training = {
        "output_dir": str(tmp_path / name), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 2, "save_steps": 3, "use_cpu": True, "disable_tqdm": True, "seed": 1,
    } | parts.pop("training", {})  # fmt: skip
    base = {"path": str(rows), "validation_split": "train", "max_length": 16}
    values = {"model": model, "data": base | parts.pop("data"), "training": training}
    return make_recipe(values | parts)


def classifier(tmp_path, sentences, name="run", **parts):
    bert = save_with_tokenizer(parts.pop("base", None) or tiny_bert(), tmp_path / "bert")
    model = {"path": bert, "task": "sequence_classification"}
    values = {
        "adapter": {"method": "pst", "sparsity": 0.75},
        "data": {"text": "text", "label": "label"},
        "evaluation": {"metrics": ["accuracy", "f1"]},
    }
    return recipe(tmp_path, model | parts.pop("model", {}), sentences, name, **values | parts)


def language_model(tmp_path, sentences, **parts):
    model = {"path": save_with_tokenizer(parts.pop("base", None) or tiny_llama(), tmp_path / "llama")}
    values = {
        "adapter": {"method": "spp", "r": 4},
        "prune": {"method": "wanda", "pattern": "2:4", "calibration": {"num_sequences": 4, "length": 8}},
        "data": {"text": "text"},
    }
    return recipe(tmp_path, model | parts.pop("model", {}), sentences, **values | parts)
