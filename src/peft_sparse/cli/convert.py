"""`peft-sparse merge`, `pack` and `unpack`: from one folder to another."""

from __future__ import annotations

import argparse
from typing import Any

from peft_sparse.cli._options import Outcome, add_command, add_dry_run, add_loading, positive

MERGE_EXAMPLES = """\
  peft-sparse merge out/adapter merged
  peft-sparse merge out/checkpoint-500 merged --base ./pruned --pack
  peft-sparse merge my-lora merged --dry-run     says how many zeros that merge would lose
"""
PACK_EXAMPLES = """\
  peft-sparse pack merged packed
  peft-sparse pack merged packed --dry-run       the size it would have
"""
UNPACK_EXAMPLES = """\
  peft-sparse unpack packed dense
  peft-sparse unpack owner/packed-model dense --json
"""


def add_commands(commands: Any) -> None:
    """Add the commands."""
    merge = add_command(
        commands,
        "merge",
        run_merge,
        "merge an adapter into its base model and check the zeros",
        "Merge an adapter (PST, SPP, or another method of PEFT) into its base model. For all but PST, which adds\n"
        "zeros by design, every zero of the base has to be there afterwards: exit status 1 if one is not.",
        MERGE_EXAMPLES,
    )
    merge.add_argument("adapter", metavar="ADAPTER", help="a folder with adapter_config.json")
    merge.add_argument("output", metavar="OUTPUT", help="a new folder")
    merge.add_argument("--base", metavar="MODEL", help="the base model (default: what the adapter names)")
    merge.add_argument("--num-labels", type=positive, metavar="N", help="of a classifier (default: of its saved head)")
    merge.add_argument("--pack", action="store_true", help="save packed")
    add_loading(merge)
    add_dry_run(merge)
    pack = add_command(
        commands,
        "pack",
        run_pack,
        "store a model without its zeros",
        "Save a dense model so that each zero takes one bit, bit for bit the same model. Plain transformers refuses\n"
        "the result; `load_sparse` and `peft-sparse unpack` read it. Tensors that transformers does not load, such\n"
        "as layers for multi-token prediction, are left out, and named in a warning.",
        PACK_EXAMPLES,
    )
    pack.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    unpack = add_command(
        commands,
        "unpack",
        run_unpack,
        "store a packed model densely again",
        "Save a packed model as plain transformers reads it, bit for bit what was packed. Also reads the sparse\n"
        "layouts of compressed-tensors up to 0.14.",
        UNPACK_EXAMPLES,
    )
    for parser in (pack, unpack):
        parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hub")
        parser.add_argument("output", metavar="OUTPUT", help="a new folder")
        parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
        add_dry_run(parser)


def run_merge(options: argparse.Namespace) -> Outcome:
    """Merge, check, save."""
    from peft_sparse.checkpoint import merge_checkpoint

    result, verified = merge_checkpoint(
        options.adapter,
        options.output,
        base=options.base,
        task=options.task,
        dtype=options.dtype,
        packed=options.pack,
        num_labels=options.num_labels,
        trust_remote_code=options.trust_remote_code,
        dry_run=options.dry_run,
    )
    if verified is None:
        return Outcome(result.to_dict() | {"verified": None}, str(result))
    text = str(result) + "\n" + (f"checked   no zero lost of the base's, {verified.gained:,} gained")
    if not verified.ok:
        text = f"{result}\n\n{verified}"
    return Outcome(result.to_dict() | {"verified": verified.to_dict()}, text, verified.exit_status)


def run_pack(options: argparse.Namespace) -> Outcome:
    """Pack a folder."""
    from peft_sparse.checkpoint import pack_checkpoint

    result = pack_checkpoint(
        options.model,
        options.output,
        max_shard_size=options.max_shard_size,
        trust_remote_code=options.trust_remote_code,
        dry_run=options.dry_run,
    )
    return Outcome(result.to_dict(), str(result))


def run_unpack(options: argparse.Namespace) -> Outcome:
    """Unpack a folder."""
    from peft_sparse.checkpoint import unpack_checkpoint

    result = unpack_checkpoint(
        options.model, options.output, trust_remote_code=options.trust_remote_code, dry_run=options.dry_run
    )
    return Outcome(result.to_dict(), str(result))
