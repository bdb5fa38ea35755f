"""NLG: a language model learns to put E2E's meaning representations into words.

A training text is "<representation>\\n<reference>\\n"; only the reference is learnt. The validation part are whole
representations of the training file, so that none is in both. Measured on the test set: the loss of a reference in
bits for each character, and BLEU of greedy generation against all references.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.leaderboard import metrics, training
from benchmarks.leaderboard.sparsifying import SPLIT_SEED, Sparsifying

END = "\n"
IGNORED = -100
EVALUATION_BATCH = 32
MAX_NEW_CHARACTERS = 160


class Nlg(Sparsifying):
    """The part `nlg`."""

    name = "nlg"
    metric, better = "bits per character", "lower"
    tasks = ("e2e",)
    task_type = "CAUSAL_LM"
    rate_scale = 9.0  # two steps of the search: dense tuning of the small GPT-2 is best at 3e-3, of MiniLM at 1e-4

    @cache  # noqa: B019 # lives as long as the process
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    @cache  # noqa: B019
    def _pairs(self, split: str) -> list[tuple[str, list[str]]]:
        """(representation, references); of "train" and "validation" one reference each."""
        name = "test" if split == "test" else "train"
        lines = (self.data / "e2e_nlg" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        if split == "test":
            step = 1 if self.budget.test_rows is None else max(1, len(rows) // self.budget.test_rows)
            several = [(row["mr"], row["refs"]) for row in rows]
            return several[::step][: self.budget.test_rows]  # of the whole file, which is sorted by restaurant
        meanings = list(dict.fromkeys(row["mr"] for row in rows))
        order = torch.randperm(len(meanings), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        apart = {meanings[index] for index in order[: max(1, len(meanings) // 10)]}
        chosen = [(row["mr"], [row["ref"]]) for row in rows if (row["mr"] in apart) == (split == "validation")]
        return chosen if split == "train" else chosen[: self.budget.validation_rows]

    def load(self, task: str, folder: Path | None = None) -> nn.Module:
        folder = self.folder if folder is None else folder
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device)

    def num_train(self, task: str) -> int:
        return len(self._pairs("train"))

    def collate(self, task: str, indices: list[int]) -> training.Batch:
        pairs = self._pairs("train")
        return self._batch([(pairs[index][0], pairs[index][1][0]) for index in indices])

    def _batch(self, pairs: list[tuple[str, str]]) -> training.Batch:
        rows, labels = [], []
        for meaning, reference in pairs:
            prompt = self._tokenizer()(meaning + END)["input_ids"]
            answer = self._tokenizer()(reference + END)["input_ids"]
            rows.append((prompt + answer)[: self.budget.length])
            labels.append(([IGNORED] * len(prompt) + answer)[: self.budget.length])
        width = max(len(row) for row in rows)
        batch = {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
        }
        return {name: value.to(self.device) for name, value in batch.items()}

    @torch.no_grad()
    def measure(self, task: str, model: nn.Module, final: bool) -> dict[str, float]:
        pairs = self._pairs("test" if final else "validation")
        flat = [(meaning, reference) for meaning, several in pairs for reference in several[:1]]
        total, count = 0.0, 0
        for start in range(0, len(flat), EVALUATION_BATCH):
            batch = self._batch(flat[start : start + EVALUATION_BATCH])
            logits = training.outputs(model, batch)
            labels = batch["labels"][:, 1:].cpu()
            sums = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            total += sums.item()
            count += sum(len(reference) + len(END) for _, reference in flat[start : start + EVALUATION_BATCH])
        bits = total / count / math.log(2)
        found = {"score": bits, self.metric: bits}
        if final:
            texts = generate(model, self._tokenizer(), [meaning + END for meaning, _ in pairs])
            found["BLEU"] = metrics.bleu(texts, [references for _, references in pairs])
        return found


@torch.no_grad()
def generate(model: nn.Module, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The greedy continuation of each prompt up to the end of its line; all are continued at once, padded in front."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    end, width = tokenizer(END)["input_ids"][-1], max(len(row) for row in encoded)
    device = next(model.parameters()).device
    given = torch.tensor([[end] * (width - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)
    last = model.config.max_position_embeddings - 1
    limits = [min(MAX_NEW_CHARACTERS, last + 1 - len(row)) for row in encoded]
    cache_of_keys, found = None, given[:, :0]
    while found.shape[1] < max(limits) and not (found == end).any(1).all():
        # A row beyond its limit stays at the last position; what it gets there is cut off.
        positions = (mask.cumsum(1) - 1).clamp(0, last)[:, -given.shape[1] :]
        result = model(
            input_ids=given, attention_mask=mask, position_ids=positions, past_key_values=cache_of_keys, use_cache=True
        )
        cache_of_keys, given = result.past_key_values, result.logits[:, -1:].argmax(-1)
        found, mask = torch.cat([found, given], 1), torch.cat([mask, torch.ones_like(given)], 1)
    rows = [row[:limit] for row, limit in zip(found.tolist(), limits, strict=True)]
    return [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]
