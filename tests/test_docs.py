"""The guides are true: the code blocks of each page run, in order, on tiny models of the same classes."""

import os
import re
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import peft_sparse

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python" in page.read_text())
MARKS = {"[PAD]": "pad_token", "[UNK]": "unk_token", "[EOS]": "eos_token"}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, str]:
    """The names that the pages use, and a folder for each with a tiny model of that class and a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=64, special_tokens=list(MARKS))
    tokenizer.train_from_iterator(["a fine film, a dull film: what a joy and what a waste of the class"], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{kind: mark for mark, kind in MARKS.items()})
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    llama = LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=512)
    bert = BertConfig(**sizes, num_hidden_layers=2)
    made = {
        "HuggingFaceTB/SmolLM2-135M": LlamaForCausalLM(llama),
        "google-bert/bert-base-uncased": BertForSequenceClassification(bert),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        wrapped.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


@pytest.mark.filterwarnings("ignore")  # tiny models, trained for a few steps
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_blocks_run(page, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for name, folder in small.items():
            block = block.replace(f'"{name}"', repr(folder))
        block = re.sub(r"max_steps=\d+", "max_steps=3", block)
        exec(compile(block, page.name, "exec"), scope)
    assert os.listdir(tmp_path)  # every guide leaves a file: a model that somebody wants


def test_all_pages_are_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", str(navigation)))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_links_lead_somewhere():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_reference_has_all_public_names():
    names = set(re.findall(r"::: peft_sparse\.(\w+)", (DOCS / "reference" / "index.md").read_text()))
    results = {"SparsityReport", "VerifyReport", "PstModel", "SppModel", "__version__"}
    assert names == set(peft_sparse.__all__) - results
