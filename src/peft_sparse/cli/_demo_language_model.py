"""Part (a) of the demo: prune a language model, tune it with SPP, merge, save, reload in plain transformers.

For each pattern: perplexity of the pruned model, of the tuned one, and of what was saved and loaded again; and the
zeros, compared by position at each of these stages. A dense model that LoRA tunes on the same text shows how much of
the gain is the text's own kind, and not repair.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from peft_sparse.cli._demo_data import DemoError
from peft_sparse.cli._demo_training import device, quiet, train
from peft_sparse.evaluation import perplexity, sparsity_report
from peft_sparse.linears import block_linear_names, block_linears, get_weight
from peft_sparse.pruning import prune_wanda
from peft_sparse.tuners.spp import SppConfig

# pattern: its name in the table, and in the folder where the model is saved
PATTERNS = {"2:4": ("Wanda 2:4", "wanda-2-4"), "unstructured": ("Wanda 50%", "wanda-50")}
MAX_WINDOW = 256
BATCH_SIZE = 1
# The paper's 4e-3 is for LLaMA-7B and thousands of steps; in some dozens 2e-2 repairs far more.
SPP_LR = 2e-2
LORA_LR = 1e-3
# SPP with 16 row groups and LoRA of rank 8 train about 2.5M parameters of SmolLM2 each.
LORA_RANK = 8


@dataclass(frozen=True)
class Settings:
    """What part (a) runs on; `model` is a folder, or a name on the Hub."""

    model: str
    output: Path
    steps: int = 32
    calibration_windows: int = 16
    held_out_windows: int = 16
    seed: int = 0

    @property
    def windows(self) -> int:
        """How many windows of text it wants."""
        return max(self.calibration_windows, self.steps * BATCH_SIZE) + self.held_out_windows


@dataclass(frozen=True)
class Text:
    """Token ids, (windows, tokens): to train on, the first of those to calibrate with, and held out."""

    train: torch.Tensor
    calibration: torch.Tensor
    held_out: torch.Tensor

    @property
    def window(self) -> int:
        """Tokens per window."""
        return self.held_out.shape[1]


@dataclass(frozen=True)
class Row:
    """What was measured of one model; of zeros, those in the linears of the blocks. None: not for the dense model."""

    name: str
    tuner: str
    perplexity_untuned: float
    perplexity_tuned: float
    trainable_parameters: int
    trainable_share: float  # of the dense model's parameters
    seconds: float
    perplexity_reloaded: float | None = None
    sparsity: float | None = None
    zeros_pruned: int | None = None
    zeros_merged: int | None = None
    zeros_reloaded: int | None = None
    zeros_moved: int | None = None  # weights that are zero at one of these stages and not at another
    saved_in: str | None = None


def run(settings: Settings, text: Text) -> list[Row]:
    """Measure the dense model, tuned too, and each pattern."""
    return [_dense(settings, text), *(_pruned(settings, text, pattern) for pattern in PATTERNS)]


# Text


def cut_text(settings: Settings, documents: list[str]) -> Text:
    """Tokenise the documents and cut them into windows; the last documents are held out, and no other text is.

    Raises:
        DemoError: if the documents are too short.
    """
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(settings.model), AutoConfig.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise DemoError(f"The model {settings.model} could not be loaded ({error})") from error
    window = min(MAX_WINDOW, getattr(config, "max_position_embeddings", MAX_WINDOW))
    separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] + separator for text in documents]
    held_out: list[int] = []
    while tokens and len(held_out) < settings.held_out_windows * window:
        held_out = tokens.pop() + held_out
    held_out_windows = _cut(held_out, window)[: settings.held_out_windows]
    train_windows = _cut([token for document in tokens for token in document], window)
    if len(train_windows) < settings.calibration_windows or len(held_out_windows) < settings.held_out_windows:
        raise DemoError(
            f"The demo wants {settings.held_out_windows} windows of {window} tokens to hold out and at least "
            f"{settings.calibration_windows} more to train on, got {len(held_out_windows)} and {len(train_windows)}; "
            "choose a larger data set."
        )
    return Text(train_windows, train_windows[: settings.calibration_windows], held_out_windows)


def _cut(tokens: list[int], window: int) -> torch.Tensor:
    return torch.tensor(tokens[: len(tokens) // window * window], dtype=torch.long).reshape(-1, window)


# Rows


def _dense(settings: Settings, text: Text) -> Row:
    start = time.perf_counter()
    print("\ndense: tune with LoRA", flush=True)
    model = _load(settings.model)
    untuned = _perplexity(model, text, "dense")
    config = LoraConfig(r=LORA_RANK, target_modules=block_linear_names(model), task_type=TaskType.CAUSAL_LM)
    _, tuned = _tune(model, config, LORA_LR, "LoRA on dense", settings, text)
    return Row("dense", "LoRA", untuned, **tuned, seconds=time.perf_counter() - start)


def _pruned(settings: Settings, text: Text, pattern: str) -> Row:
    start = time.perf_counter()
    name, short_name = PATTERNS[pattern]
    print(f"\n{name}: prune, tune with SPP, merge, save, reload", flush=True)
    model = _load(settings.model)
    prune_wanda(model, [{"input_ids": window[None]} for window in text.calibration], pattern=pattern)
    pruned = _zeros(model)
    untuned = _perplexity(model, text, "pruned")

    adapted, tuned = _tune(model, SppConfig(task_type=TaskType.CAUSAL_LM), SPP_LR, f"SPP on {name}", settings, text)
    merged_model = adapted.merge_and_unload()
    merged = _zeros(merged_model)
    folder = settings.output / f"{Path(settings.model).name}-{short_name}-spp"
    _save(merged_model, settings, folder)

    reloaded_model = _load(str(folder))  # plain transformers: nothing in the folder is of this package
    reloaded = _zeros(reloaded_model)
    row = Row(
        name,
        "SPP",
        untuned,
        **tuned,
        perplexity_reloaded=_perplexity(reloaded_model, text, "reloaded"),
        sparsity=sparsity_report(folder).total_sparsity,
        zeros_pruned=_count(pruned),
        zeros_merged=_count(merged),
        zeros_reloaded=_count(reloaded),
        zeros_moved=_num_different(pruned, merged) + _num_different(merged, reloaded),
        saved_in=str(folder),
        seconds=time.perf_counter() - start,
    )
    _check(row)
    return row


def _tune(
    model: PreTrainedModel, config: PeftConfig, lr: float, title: str, settings: Settings, text: Text
) -> tuple[PeftModel, dict[str, Any]]:
    """The model with a trained adapter, and the part of its [`Row`] that is about that."""
    set_seed(settings.seed)
    num_parameters = model.num_parameters()
    adapted = get_peft_model(model, config)
    trainable, _ = adapted.get_nb_trainable_parameters()
    dataset = [{"input_ids": window, "labels": window} for window in text.train]
    train(adapted, dataset, title=title, steps=settings.steps, batch_size=BATCH_SIZE, lr=lr, seed=settings.seed)
    return adapted, {
        "perplexity_tuned": _perplexity(adapted, text, "tuned"),
        "trainable_parameters": trainable,
        "trainable_share": trainable / num_parameters,
    }


def _check(row: Row) -> None:
    """What the package promises.

    Raises:
        RuntimeError: if a zero moved, or the saved model is not the tuned one.
    """
    if row.zeros_moved or not math.isclose(row.perplexity_reloaded or 0, row.perplexity_tuned, rel_tol=1e-3):
        raise RuntimeError(
            f"A saved model has the zeros and the perplexity of the tuned one, got {row}; please report this."
        )


def _zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where the linears of the blocks are zero, bool (out, in) by name."""
    return {name: (get_weight(linear) == 0).cpu() for name, linear in block_linears(model).items()}


def _count(zeros: dict[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in zeros.values())


def _num_different(zeros: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> int:
    return sum(int((mask != others[name]).sum()) for name, mask in zeros.items())


def _perplexity(model: nn.Module, text: Text, stage: str) -> float:
    value = perplexity(model, text.held_out.flatten(), window=text.window)
    print(f"Perplexity, {stage}: {value:.2f}", flush=True)
    return value


# Loading and saving


def _load(name: str) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device()).eval()


def _save(model: PreTrainedModel, settings: Settings, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with quiet():
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(settings.model).save_pretrained(folder)
