"""What lies in a model's folder beside the model: files that a tokenizer or a processor may need.

Their names are the tokenizers' own business (`spm.model`, `bpe.codes`, `target_vocab.json`), and one that is lost may
give another tokenizer and no error. So they are told by what they are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

# Weights in formats that are not read here, and their parts.
OTHER_WEIGHTS = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.ckpt.*", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.onnx.data",
    "*.ot", "*.gguf", "*.ggml", "*.tflite", "*.mlmodel", "*.npz", "*.npy", "*.pkl", "*.pickle", "*.engine",
]  # fmt: skip
# Pictures, data and archives.
_DATA = [
    "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.wav", "*.pdf", "*.csv", "*.tsv", "*.jsonl",
    "*.parquet", "*.arrow", "*.zip", "*.tar", "*.gz", "*.log", "*.ipynb",
]  # fmt: skip
# What no load needs, of a model or of a tokenizer.
UNWANTED = [*OTHER_WEIGHTS, *_DATA, ".*"]

# The model's own, what is said about it, and what training leaves (our own notes begin with the package's name).
_OF_THE_MODEL = [
    "peft_sparse_*",
    "*.safetensors", "*.index.json", "config.json", "generation_config.json", "adapter_config.json", "params.json",
    "quant*_config.json", "modules.json", "*sentence_*.json", "trainer_state.json", "*result.json", "*results.json",
    "*.md", "*.py", "*.sh", "*.yaml", "*.yml", "*.toml", "license*", "licence*", "notice*", "use_policy*",
    "requirements*",
]  # fmt: skip
_OWN_CODE = ["tokeni[sz]ation*.py", "*process*.py"]  # of a tokenizer or a processor
LARGEST = 1 << 28  # bytes; more is data of somebody's
CHAT_TEMPLATES = "additional_chat_templates"  # the one subfolder of a tokenizer
# Of a repository all others are left there, copies in other formats. Patterns have no "but", so: what ends otherwise.
SUBFOLDERS = [f"*[!{letter}]{CHAT_TEMPLATES[i + 1 :]}/*" for i, letter in enumerate(CHAT_TEMPLATES)]


def companions(folder: Path) -> Iterator[Path]:
    """The files of a folder that may belong to the model's tokenizer or processor, as paths within the folder."""
    for path in sorted([*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATES}/*.jinja")]):
        name = path.name.lower()
        own_code = any(fnmatch(name, pattern) for pattern in _OWN_CODE)
        other = any(fnmatch(name, pattern) for pattern in (*UNWANTED, *_OF_THE_MODEL))
        if path.is_file() and (own_code or not other) and path.stat().st_size <= LARGEST:
            yield path.relative_to(folder)


def belongs_to_tokenizer(path: Path) -> bool:
    """Whether one of [`companions`] is read with a tokenizer: not a processor's settings, nor code."""
    return "process" not in path.name.lower() and path.suffix != ".py"
