"""Fixtures that every test may use, and the promise that no test reaches for the Hugging Face Hub.

What lies in `shared/` (oracle tensors, two small pretrained models, data) is not part of the repository: it is looked
for beside the repository's folder, or where PEFT_SPARSE_SHARED points. Without it the tests that need it are skipped.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its warning after a fork would hide others

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

import models

# Tiny models are slower on several threads, and many times slower beside other jobs.
torch.set_num_threads(1)

# How long an example takes depends on what else the machine does. (Where CI is set, hypothesis has no deadline by
# itself, and takes the same examples in every run.)
if not os.environ.get("CI"):
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no process is left with a long one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


class Oracles(NamedTuple):
    """Numbers of the authors' code: `cases[kind]` lists settings, `tensors[case["prefix"] + name]` has the tensors."""

    cases: dict[str, list[dict]]
    tensors: dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data that is not part of the repository."""
    folder = Path(os.environ.get("PEFT_SPARSE_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip("no folder shared/ beside the repository; set PEFT_SPARSE_SHARED to where it is")
    return folder


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is not in the shared folder")
    return path


@pytest.fixture(scope="session")
def oracles(shared: Path) -> Oracles:
    """What the authors' implementations compute. Shared by all tests: clone a tensor before changing it."""
    cases = json.loads(_existing(shared / "oracles" / "oracles.json").read_text())
    return Oracles(cases, load_file(_existing(shared / "oracles" / "oracles.safetensors")))


@pytest.fixture(scope="session")
def llama_dir(shared: Path) -> Path:
    """stories260K as a transformers folder: a real pretrained Llama of 260,032 parameters, with its tokenizer."""
    return _existing(shared / "models" / "stories260k-llama")


@pytest.fixture(scope="session")
def gpt2_dir(shared: Path) -> Path:
    """A trained GPT-2 of 859,008 parameters (Conv1D layers) with a tokenizer of bytes."""
    return _existing(shared / "models" / "gpt2-byte-shakespeare")


@pytest.fixture
def transformers_adapters() -> None:
    """For tests of transformers' own `model.add_adapter` and the like, which refuse a PEFT that is too old for them;
    for transformers 5.24 every released one is."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as refusal:
        pytest.skip(f"transformers' own adapter functions: {refusal}")


@pytest.fixture(scope="session")
def one_graph() -> bool:
    """Whether the compiler makes one graph of a model, for `fullgraph`. That of torch 2.6 makes several: it enters no
    context manager of Python code, as PEFT's forward has, and sees no method of packed weights, named tuples."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        yield

    def function(x: torch.Tensor) -> torch.Tensor:
        with context():
            return x + 1

    try:
        torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(1))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.fixture
def tiny_llama() -> models.LlamaForCausalLM:
    """A new random Llama; see models.py."""
    return models.tiny_llama()


@pytest.fixture
def tiny_gpt2() -> models.GPT2LMHeadModel:
    """A new random GPT-2; see models.py."""
    return models.tiny_gpt2()


@pytest.fixture
def tiny_bert() -> models.BertForSequenceClassification:
    """A new random BERT classifier; see models.py."""
    return models.tiny_bert()


@pytest.fixture(scope="session")
def hub_stand_ins(tmp_path_factory) -> dict[str, str]:
    """Names on the Hub that guides and notebooks use, and for each a folder with a tiny model of the same class."""
    folder = tmp_path_factory.mktemp("models")
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=64, special_tokens=list(marks.values()))
    tokenizer.train_from_iterator(["a fine film, a dull film: what a joy and what a waste of the class"], trainer)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    llama = LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=512)
    made = {
        "HuggingFaceTB/SmolLM2-135M": LlamaForCausalLM(llama),
        "google-bert/bert-base-uncased": BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=2)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}
