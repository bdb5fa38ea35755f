"""From one folder to another: prune, merge, pack and unpack a stored model. What the command line calls.

A target folder is new or empty, since what is in the way may be somebody's only copy. It is written beside its place
and gets its name when it is complete, so that an error or an interruption leaves nothing behind.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peft_sparse.checkpoint.load import load_stored
from peft_sparse.checkpoint.lookup import has_tokenizer, load_tokenizer
from peft_sparse.checkpoint.merged import save_with_card
from peft_sparse.checkpoint.models import load_model, pad_as
from peft_sparse.checkpoint.save import save_sparse, shard_size
from peft_sparse.checkpoint.tasks import auto_class
from peft_sparse.evaluation import VerifyReport, sparsity_report, verify_sparsity
from peft_sparse.linears import unpack_model
from peft_sparse.storage import companions, locate, locate_companions, open_model
from peft_sparse.storage.format import pack_weight


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote, or would write.

    Attributes:
        action: "pruned", "merged", "packed" or "unpacked".
        source, folder: from where to where.
        written: False for a dry run.
        sparsity: share of zeros in the linears of the blocks.
        pattern: of those zeros.
        zeros, weights: how many.
        bytes_before, bytes_after: of the weights' files; None where it is not known without writing them.
        output_errors: how far the outputs of the linears have moved on the calibration data, relative to their size,
            from the least to the most; None where a pruner did not measure it.
    """

    action: str
    source: str
    folder: str
    written: bool
    sparsity: float
    pattern: str
    zeros: int
    weights: int
    bytes_before: int | None = None
    bytes_after: int | None = None
    output_errors: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        verb = self.action if self.written else f"would be {self.action} (dry run, nothing is written)"
        lines = [
            f"{self.source}: {verb}",
            f"to        {self.folder}",
            f"zeros     {self.zeros:,} of {self.weights:,} weights in the linears, {self.sparsity:.2%} "
            f"({self.pattern})",
        ]
        if self.output_errors is not None:
            low, high = self.output_errors
            lines.append(f"errors    {low:.3f} to {high:.3f} of the outputs' size; `peft-sparse report` lists them")
        if self.bytes_before and self.bytes_after:
            share = self.bytes_after / self.bytes_before
            lines.append(
                f"weights   {self.bytes_after / 1e6:,.2f} MB, {share:.1%} of the {self.bytes_before / 1e6:,.2f} MB "
                "before"
            )
        return "\n".join(lines)


def check_new_folder(folder: str | Path) -> Path:
    """Raises:
    ValueError: if the folder is a file, there is something in it, or it cannot be made here."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        kind = "which is a file" if not folder.is_dir() else "which is not empty"
        raise ValueError(f"A result goes into a new folder, got {str(folder)!r}, {kind}; choose another name.")
    check_writable(folder)
    return folder


def check_writable(folder: str | Path) -> None:
    """Before work that takes long.

    Raises:
        ValueError: if nothing can be written in the folder, or the folder cannot be made where it is not there yet.
    """
    folder = Path(folder).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:  # what permissions say is not all: a file system may be read-only
        Path(tempfile.mkdtemp(prefix=".peft-sparse-", dir=there)).rmdir()
    except OSError as error:
        raise ValueError(
            f"A result goes into a folder that can be written, got {str(folder)!r} ({error.strerror} in "
            f"{str(there)!r}); choose another place."
        ) from error


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `folder` when the block ends, and is removed after an error."""
    folder = check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # a temporary folder is its owner's alone
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy what belongs to a tokenizer or processor from one folder to another, where it is not there yet."""
    for path in companions(Path(source)):
        if not (folder / path).exists():
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(source, path), folder / path)


def save_model(model: Any, folder: Path, packed: bool, tokenizer_from: str | Path) -> None:
    """Save a whole model, dense or packed, with a model card and the tokenizer files of a folder. One that is packed
    in memory is unpacked in place to be saved dense."""
    if packed:
        save_sparse(model, folder)
    else:
        save_with_card(unpack_model(model), folder)
    copy_tokenizer(tokenizer_from, folder)


def pack_checkpoint(source: str | Path, folder: str | Path, *, task: str | None = None, dry_run: bool = False,
                    max_shard_size: int | str = "5GB", trust_remote_code: bool = False) -> Converted:  # fmt: skip
    """Store a dense model packed, as [`save_sparse`] does, bit for bit.

    Args:
        source: a folder with a dense model, or a name on the Hub.
        folder: where to; new or empty.
        task: see [`load_model`].
        dry_run: load it, and say what would be written.
        max_shard_size, trust_remote_code: see [`save_sparse`] and [`load_model`].

    Raises:
        ValueError: if the source is packed already or is no model, the folder is not empty, or the size is none.
    """
    folder, limit = check_new_folder(folder), shard_size(max_shard_size)
    stored = open_model(locate(source))
    if stored.layout != "dense":
        raise ValueError(f"`pack` takes a dense model, got one that is packed ({stored.layout}) in {str(source)!r}.")
    if (stored.folder / "adapter_config.json").is_file():
        raise ValueError(f"`pack` takes a model without adapters, got one in {str(source)!r}; merge it first.")
    if stored.config.get("quantization_config"):
        raise ValueError(
            f"`pack` takes floating point weights, got a quantized model in {str(source)!r}; dequantize it with "
            "`model.dequantize()` and save that."
        )
    model_cls = None if task is None else auto_class(task)
    model = load_stored(stored, exact=True, model_cls=model_cls, trust_remote_code=trust_remote_code)
    if dry_run:
        size = sum(_packed_bytes(tensor.read()) for tensor in stored.tensors.values())
        return _converted("packed", source, folder, stored.folder, _bytes(stored.folder), size, written=False)
    with new_folder(folder) as temporary:
        save_sparse(model, temporary, max_shard_size=limit)
        copy_tokenizer(stored.folder, temporary)
    return _converted("packed", source, folder, folder, _bytes(stored.folder), _bytes(folder))


def unpack_checkpoint(source: str | Path, folder: str | Path, *, task: str | None = None, dry_run: bool = False,
                      trust_remote_code: bool = False) -> Converted:  # fmt: skip
    """Store a packed model dense, as plain transformers reads it, bit for bit what was packed.

    Args:
        source, folder, task, dry_run, trust_remote_code: as in [`pack_checkpoint`]; also the old layouts that
            [`load_sparse`] reads.

    Raises:
        ValueError: if the source is dense or damaged, or the folder is not empty.
    """
    folder = check_new_folder(folder)
    stored = open_model(locate(source))
    if stored.layout == "dense":
        raise ValueError(f"`unpack` takes a packed model, got a dense one in {str(source)!r}.")
    if dry_run:
        size = sum(tensor.read().nbytes for tensor in stored.tensors.values())
        return _converted("unpacked", source, folder, stored.folder, _bytes(stored.folder), size, written=False)
    model = load_stored(stored, exact=True, trust_remote_code=trust_remote_code)
    with new_folder(folder) as temporary:
        save_model(model, temporary, False, stored.folder)
    return _converted("unpacked", source, folder, folder, _bytes(stored.folder), _bytes(folder))


def merge_checkpoint(
    adapter: str | Path,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    task: str | None = None,
    dtype: str | None = None,
    packed: bool = False,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
    dry_run: bool = False,
) -> tuple[Converted, VerifyReport | None]:
    """Merge an adapter, of ours or another method of PEFT, into its base model, and check the zeros.

    Args:
        adapter: a folder that `save_pretrained` of a PeftModel wrote.
        folder: where to; new or empty.
        base: the base model; None: the one that the adapter's config names.
        task, dtype, trust_remote_code: see [`load_model`].
        packed: save packed.
        num_labels: of a classifier; None: as its saved head has.
        dry_run: merge in memory, and write nothing.

    Returns:
        What was written, and what verification against the base found; None for PST, which adds zeros by design and
        starts from a dense model.

    Raises:
        ValueError: if there is no adapter, or merging would lose zeros or change the function.
    """
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"An adapter is a folder with adapter_config.json, got {str(adapter)!r}, which has none.")
    folder = check_new_folder(folder)
    config = {} if num_labels is None else {"num_labels": num_labels}
    model = load_model(adapter, task, dtype=dtype, trust_remote_code=trust_remote_code, config=config, base=base)
    settings = next(iter(model.peft_config.values()))
    origin = model.get_base_model().name_or_path
    keeps = str(getattr(settings.peft_type, "value", settings.peft_type)) != "PST"
    beside = locate_companions(origin)
    if settings.task_type == "SEQ_CLS" and has_tokenizer(adapter):
        pad_as(model.get_base_model(), load_tokenizer(adapter, trust_remote_code=trust_remote_code))
    merged = model.merge_and_unload()
    verified = verify_sparsity(merged, reference=str(origin)) if keeps else None
    report = sparsity_report(merged)
    if not dry_run:
        with new_folder(folder) as temporary:
            save_model(merged, temporary, packed, adapter)  # a tokenizer that was changed for it is beside it
            copy_tokenizer(beside, temporary)
    counts = (report.total_sparsity, report.pattern, report.total_zeros, report.total_numel)
    after = None if dry_run else _bytes(folder)
    return Converted("merged", str(adapter), str(folder), not dry_run, *counts, None, after), verified


def _converted(
    action: str, source: Any, folder: Any, counted: Path, before: int, after: int, written: bool = True
) -> Converted:
    report = sparsity_report(counted)
    counts = (report.total_sparsity, report.pattern, report.total_zeros, report.total_numel)
    return Converted(action, str(source), str(folder), written, *counts, before, after)


def _packed_bytes(tensor: torch.Tensor) -> int:
    packed = pack_weight(tensor)
    return tensor.nbytes if packed is None else packed.values.nbytes + packed.bitmask.nbytes


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
