"""From one folder to another: merge, pack and unpack a stored model, as the command line does; prune.py prunes one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_sparse.checkpoint.complete import left_out, left_out_of
from peft_sparse.checkpoint.generation import generation_config_as_it_is
from peft_sparse.checkpoint.load import load_stored
from peft_sparse.checkpoint.lookup import check_merges, has_tokenizer, load_tokenizer
from peft_sparse.checkpoint.models import load_model, pad_as
from peft_sparse.checkpoint.new_folder import check_new_folder, copy_tokenizer, new_folder, save_model
from peft_sparse.checkpoint.save import save_sparse, shard_size
from peft_sparse.checkpoint.tasks import auto_class
from peft_sparse.evaluation import SparsityReport, VerifyReport, sparsity_report, verify_sparsity
from peft_sparse.storage import StoredTensor, locate, locate_companions, open_model
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
        left_out: tensors of the source that the model's class has no place for, which the result has not.
        base: what an adapter was merged into, since a name such as "pruned" is another model in another folder.
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
    left_out: list[str] = field(default_factory=list)
    base: str | None = None

    @classmethod
    def of(
        cls,
        action: str,
        source: str | Path,
        folder: str | Path,
        report: SparsityReport,
        written: bool = True,
        **more: Any,
    ) -> Converted:
        """With the zeros of a report; `more` are further attributes."""
        counts = (report.total_sparsity, report.pattern, report.total_zeros, report.total_numel)
        return cls(action, str(source), str(folder), written, *counts, **more)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        verb = self.action if self.written else f"would be {self.action} (dry run, nothing is written)"
        lines = [
            f"{self.source}: {verb}",
            *([] if self.base is None else [f"base      {self.base}"]),
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


def pack_checkpoint(
    source: str | Path,
    folder: str | Path,
    *,
    task: str | None = None,
    dry_run: bool = False,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
) -> Converted:
    """Store a dense model packed, as [`save_sparse`] does, bit for bit. Tensors that its class has no place for, which
    transformers does not load, are left out, with a warning.

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
    before, model_cls = _bytes(stored.folder), None if task is None else auto_class(task)
    model = load_stored(stored, exact=True, model_cls=model_cls, trust_remote_code=trust_remote_code)
    lost = left_out(model, stored)
    if dry_run:
        after = sum(_packed_bytes(tensor) for name, tensor in stored.tensors.items() if name not in lost)
        report, sizes = sparsity_report(stored.folder), {"bytes_before": before, "bytes_after": after}
        return Converted.of("packed", source, folder, report, False, left_out=lost, **sizes)
    with new_folder(folder) as temporary:
        with generation_config_as_it_is(model):
            save_sparse(model, temporary, max_shard_size=limit)
        copy_tokenizer(stored.folder, temporary)
    after, report = _bytes(folder), sparsity_report(folder)
    return Converted.of("packed", source, folder, report, bytes_before=before, bytes_after=after, left_out=lost)


def unpack_checkpoint(
    source: str | Path,
    folder: str | Path,
    *,
    task: str | None = None,
    dry_run: bool = False,
    trust_remote_code: bool = False,
) -> Converted:
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
    before, model_cls = _bytes(stored.folder), None if task is None else auto_class(task)
    if dry_run:
        after = sum(tensor.read().nbytes for tensor in stored.tensors.values())
        report = sparsity_report(stored.folder)
        return Converted.of("unpacked", source, folder, report, False, bytes_before=before, bytes_after=after)
    model = load_stored(stored, exact=True, model_cls=model_cls, trust_remote_code=trust_remote_code)
    with new_folder(folder) as temporary:
        save_model(model, temporary, False, stored.folder)
    after, report = _bytes(folder), sparsity_report(folder)
    return Converted.of("unpacked", source, folder, report, bytes_before=before, bytes_after=after)


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
        ValueError: if there is no adapter, it is of a method that does not merge, or merging would lose zeros or
            change the function.
    """
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"An adapter is a folder with adapter_config.json, got {str(adapter)!r}, which has none.")
    check_merges(adapter)
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
    lost = left_out_of(merged, origin, new_class=True)  # as it was when the adapter was trained
    verified = verify_sparsity(merged, reference=str(origin)) if keeps else None
    report = sparsity_report(merged)
    if not dry_run:
        with new_folder(folder) as temporary:
            save_model(merged, temporary, packed, adapter)  # a tokenizer that was changed for it is beside it
            copy_tokenizer(beside, temporary)
    after, named = None if dry_run else _bytes(folder), Path(origin)
    more = {"bytes_after": after, "left_out": lost, "base": str(named.absolute() if named.is_dir() else origin)}
    return Converted.of("merged", adapter, folder, report, not dry_run, **more), verified


def _packed_bytes(stored: StoredTensor) -> int:
    tensor = stored.read()
    packed = pack_weight(tensor)
    return tensor.nbytes if packed is None else packed.values.nbytes + packed.bitmask.nbytes


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
