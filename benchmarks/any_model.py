"""Any model: both tuners, both merges, the pruners and packed files on tiny models of many architectures.

    python -m benchmarks.any_model             # writes docs/models.md
    python -m benchmarks.any_model --only T5   # prints the rows of some

What happens to each architecture is written in `tune` (and in `prune` and `store`): every assertion there is a promise
of the package, and what a user does is called as a user calls it, with the default `target_modules`. A cell says what
came out: a tick, or the number of a note with the error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from benchmarks.architectures import ARCHITECTURES, Architecture, Batch
from peft_sparse import (
    PstConfig,
    SppConfig,
    load_sparse,
    pack_model,
    prune_magnitude,
    prune_wanda,
    save_sparse,
    unpack_model,
)
from peft_sparse.linears import block_linears, get_weight, in_out_features, linears_inside, linears_not_called, unwrap

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
STEPS = 4
PATTERNS = ("unstructured", "2:4")
SPARSITY = {"unstructured": 0.6, "2:4": 0.5}
# Largest relative difference of outputs before and after a merge or a reload: float32 rounding through two blocks.
TOLERANCE = 1e-4
TICK = "✓"

INTRODUCTION = """# Models that were tried

Tiny random models of each architecture, with the head and a batch of a task that it is used for, on a CPU in float32.
`make models-table` wrote this page (`benchmarks/any_model.py`, where each check is a line) with transformers
{transformers} and peft {peft}; `tests/test_any_model.py` compares it with new runs. What does not work is
[below the table](#what-does-not-work-and-the-error-that-you-get).

A tick means, with the default `target_modules`, both unstructured ({share:.0%} of zeros) and 2:4:

- **magnitude**, **Wanda**: every target has exactly the number of zeros that was asked for.
- **PST**, **SPP**, after {steps} training steps:
    - all tensors of the adapter learn, and nothing else but the new head;
    - the zeros are exactly as many as asked for (PST) or those of the pruned model (SPP);
    - `merge_adapter()` gives the same outputs, and `unmerge_adapter()` every bit of the base weights back;
    - a saved adapter on a new base model gives the same outputs;
    - `merge_and_unload(safe_merge=True)` gives the same outputs and the zeros of the forward, in a model that
      `save_pretrained` and `from_pretrained` hand on unchanged.
- **packed**: `save_sparse` and `load_sparse` give back every bit; SPP trains on `pack_model(model)`, merges in place,
  and has the outputs and zeros of the dense one.

*Adapted* says how many of the model's linear layers get an adapter, and their names: those of the transformer blocks.
Two kinds are left out, with a warning that names them:

- Routers and gates of experts (also those of shared experts and of Gemma 3n's AltUp): few weights on which much
  depends. They are not pruned either. `target_modules` takes them by name where they are linear layers; in Mixtral
  and others they are none.
- Linear layers whose weight the module around them takes without calling them, always or in some of its ways to
  compute: attention of WavLM, all of a mixer of Mamba but `in_proj`, `out_proj` of Mamba 2's and its kin. An adapter
  would do nothing there. Calibrated pruners see no inputs there and leave them out too; `prune_magnitude` does not.
"""


def default_targets(model: nn.Module) -> list[str]:
    """Full names of what the tuners adapt: the linears in the blocks, but those that are not called."""
    not_called = linears_not_called(model)
    return [name for name in block_linears(model) if name not in not_called]


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where the weights of the linears in the blocks are zero, by full name."""
    return {name: get_weight(unwrap(linear)).detach() == 0 for name, linear in block_linears(model).items()}


def outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The logits, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**batch).logits


def check_same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Outputs agree to rounding."""
    difference = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    assert difference <= TOLERANCE, f"outputs differ by {difference:.1e} {what}"


def check_zeros(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    """The same places are zero."""
    assert found.keys() == expected.keys(), f"other linears {what}"
    for name, zero in expected.items():
        assert torch.equal(found[name], zero), f"other zeros in `{name}` {what}"


def expected_zeros(linear: nn.Module, pattern: str) -> int:
    """The exact count for a layer."""
    in_features, out_features = in_out_features(unwrap(linear))
    if pattern == "2:4":
        return out_features * (in_features // 2)
    return int(SPARSITY[pattern] * in_features * out_features)


def pruned(architecture: Architecture, pattern: str) -> nn.Module:
    """A base model for SPP."""
    return prune_magnitude(architecture.build(), pattern, sparsity=SPARSITY[pattern])


def train(model: PeftModel, batch: Batch) -> None:
    """A few steps of AdamW, as a user's loop has them; PST's schedule is driven."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        loss = model(**batch).loss
        assert loss.isfinite(), f"the loss is {loss.item()} in step {step}"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model.base_model, "set_sparsity_step"):
            model.base_model.set_sparsity_step(step + 1, STEPS)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter.detach(), before[name])
        assert moved == (name in trainable), f"`{name}` {'was changed' if moved else 'did not learn'}"


def config_of(tuner: str, architecture: Architecture, pattern: str) -> PstConfig | SppConfig:
    """What a user writes: no target modules."""
    usual = {"task_type": architecture.task_type, "modules_to_save": list(architecture.modules_to_save) or None}
    return PstConfig(pattern=pattern, sparsity=SPARSITY[pattern], **usual) if tuner == "PST" else SppConfig(**usual)


def base_of(tuner: str, architecture: Architecture, pattern: str) -> nn.Module:
    """PST takes a dense model, SPP a pruned one."""
    return architecture.build() if tuner == "PST" else pruned(architecture, pattern)


def tune(tuner: str, architecture: Architecture, pattern: str) -> None:
    """The road of an adapter: train, merge and unmerge, save and load, merge for good, save and load."""
    batch = architecture.batch()
    base = base_of(tuner, architecture, pattern)
    zeros_before, targets = zeros_of(base), set(default_targets(base))
    model = get_peft_model(base, config_of(tuner, architecture, pattern))
    adapted = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "base_layer")}
    assert adapted == targets, f"adapted are {sorted(adapted ^ targets)} beside the linears of the blocks"
    train(model, batch)
    before = outputs(model, batch)

    weights = {name: get_weight(unwrap(m)).detach().clone() for name, m in block_linears(model).items()}
    model.merge_adapter()
    merged_zeros = zeros_of(model)
    for name, linear in block_linears(model).items():
        own_name = name.removeprefix("base_model.model.")
        if tuner == "SPP" or own_name not in targets:
            assert torch.equal(merged_zeros[name], zeros_before[own_name]), f"other zeros in `{name}`"
        else:
            assert int(merged_zeros[name].sum()) == expected_zeros(linear, pattern), f"another count in `{name}`"
    check_same(outputs(model, batch), before, "after merge_adapter()")
    model.unmerge_adapter()
    for name, linear in block_linears(model).items():
        assert torch.equal(get_weight(unwrap(linear)), weights[name]), f"another base weight in `{name}`"
    assert torch.equal(outputs(model, batch), before), "outputs differ after unmerge_adapter()"

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(base_of(tuner, architecture, pattern), folder)
        check_same(outputs(again, batch), before, "after a reload of the adapter")
        again.merge_adapter()
        check_zeros(zeros_of(again), merged_zeros, "after a reload of the adapter")

    merged = model.merge_and_unload(safe_merge=True)
    final = zeros_of(merged)
    check_zeros({f"base_model.model.{name}": zero for name, zero in final.items()}, merged_zeros, "in the end")
    check_same(outputs(merged, batch), before, "after merge_and_unload()")
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        again = type(merged).from_pretrained(folder)
    check_zeros(zeros_of(again), final, "after from_pretrained")
    check_same(outputs(again, batch), before, "after from_pretrained")


def prune(pruner: Callable[..., nn.Module], architecture: Architecture, pattern: str) -> None:
    """The exact count of zeros in every target, and a model that computes."""
    model, batch = architecture.build(), architecture.batch()
    # An encoder-decoder makes the decoder's inputs from the labels.
    inputs = {name: x for name, x in batch.items() if name != "labels" or model.config.is_encoder_decoder}
    more = () if pruner is prune_magnitude else ([inputs],)
    settings = {} if pruner is prune_magnitude else {"progress": False}
    pruner(model, *more, pattern=pattern, sparsity=SPARSITY[pattern], **settings)
    called = set(default_targets(model))
    for name, linear in block_linears(model).items():
        if pruner is not prune_magnitude and name not in called:
            assert not (get_weight(linear) == 0).any(), f"zeros in `{name}`, which calibration leaves out"
            continue
        in_features, out_features = in_out_features(linear)
        row = int(SPARSITY[pattern] * in_features)
        expected = expected_zeros(linear, pattern) if pruner is prune_magnitude else out_features * row
        found = int((get_weight(linear) == 0).sum())
        assert found == expected, f"{found} zeros instead of {expected} in `{name}`"
    assert outputs(model, batch).isfinite().all(), "outputs are not finite"


def store(architecture: Architecture, pattern: str) -> None:
    """Packed files and packed linears."""
    batch, model = architecture.batch(), pruned(architecture, pattern)
    state, before = model.state_dict(), outputs(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        save_sparse(model, folder)
        for packed in (False, True):
            again = load_sparse(folder, packed=packed)
            check_same(outputs(again, batch), before, f"after load_sparse(packed={packed})")
        for name, tensor in unpack_model(again).state_dict().items():
            assert torch.equal(tensor, state[name]), f"`{name}` is not what was saved"
    results = []
    for base in (pruned(architecture, pattern), pack_model(pruned(architecture, pattern))):
        torch.manual_seed(1)
        adapted = get_peft_model(base, config_of("SPP", architecture, pattern))
        torch.manual_seed(2)  # of dropout
        train(adapted, batch)
        results.append(unpack_model(adapted.merge_and_unload()))
    dense, packed = results
    check_zeros(zeros_of(packed), zeros_of(dense), "on the packed model")
    check_same(outputs(packed, batch), outputs(dense, batch), "on the packed model")


COLUMNS: dict[str, Callable[[Architecture, str], None]] = {
    "magnitude": lambda architecture, pattern: prune(prune_magnitude, architecture, pattern),
    "Wanda": lambda architecture, pattern: prune(prune_wanda, architecture, pattern),
    "PST": lambda architecture, pattern: tune("PST", architecture, pattern),
    "SPP": lambda architecture, pattern: tune("SPP", architecture, pattern),
    "packed": store,
}


@dataclass
class Row:
    """What came out for one architecture; `cells` has a tick or an error for each column."""

    name: str
    model_class: str
    adapted: str
    cells: dict[str, str] = field(default_factory=dict)


def try_one(name: str, architecture: Architecture, columns: Iterable[str] = COLUMNS) -> Row:
    """Run an architecture through the columns. An error is caught: it is what the table is for."""
    model = architecture.build()
    inside, every = default_targets(model), linears_inside(model)
    kinds = ", ".join(f"`{kind}`" for kind in dict.fromkeys(target.split(".")[-1] for target in inside))
    row = Row(name, architecture.model_class, f"{len(inside)} of {len(every)}: {kinds}")
    for column in columns:
        row.cells[column] = TICK
        for pattern in PATTERNS:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.manual_seed(0)
                    COLUMNS[column](architecture, pattern)
            except Exception as error:
                row.cells[column] = f"{pattern}: {type(error).__name__}: {error}"
                break
    return row


def page(rows: list[Row], refusals: list[tuple[str, str]]) -> str:
    """docs/models.md."""
    notes: list[str] = []
    head = ["architecture", "class", "adapted", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = []
        for cell in row.cells.values():
            if cell != TICK and cell not in notes:
                notes.append(cell)
            cells.append(cell if cell == TICK else f"[{notes.index(cell) + 1}]")
        lines.append("| " + " | ".join([row.name, f"`{row.model_class}`", row.adapted, *cells]) + " |")
    introduction = INTRODUCTION.format(
        transformers=transformers.__version__,
        peft=peft.__version__,
        share=SPARSITY["unstructured"],
        steps=STEPS,
    )
    parts = [introduction, "\n".join(lines)]
    if notes:
        parts += [f"[{number}]:\n\n```text\n{note}\n```" for number, note in enumerate(notes, start=1)]
    parts += ["## What does not work, and the error that you get"]
    parts += [f"**{what}.**\n\n```text\n{error}\n```" for what, error in refusals]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def refusals() -> list[tuple[str, str]]:
    """What is refused, each with the error of a real call."""
    mixtral, llama = ARCHITECTURES["Mixtral (MoE)"], ARCHITECTURES["Llama"]
    attempts = {
        "Experts that are one fused parameter (MoE models of transformers 5): only the other linear layers of their "
        "blocks are adapted, pruned and packed by default; the experts stay dense": lambda: get_peft_model(
            mixtral.build(), PstConfig(target_modules=["experts"])
        ),
        "The same with SPP": lambda: get_peft_model(
            pruned(mixtral, "2:4"), SppConfig(target_modules=["q_proj", "experts"])
        ),
        "Embeddings": lambda: get_peft_model(llama.build(), PstConfig(target_modules=["embed_tokens"])),
        "Convolutions (here those of ViT's patches)": lambda: get_peft_model(
            ARCHITECTURES["ViT"].build(), PstConfig(target_modules=["projection"])
        ),
        "A width that the pattern's M does not divide": lambda: prune_magnitude(
            nn.Sequential(nn.Linear(6, 4)), "2:4", target_modules=["0"]
        ),
        "PST on a packed model": lambda: get_peft_model(pack_model(pruned(llama, "2:4")), PstConfig()),
        "Linear layers whose weight is taken without calling them": lambda: get_peft_model(
            ARCHITECTURES["Mamba"].build(), SppConfig(target_modules=["in_proj", "out_proj"])
        ),
        "A model without repeated blocks, and no `target_modules`": lambda: get_peft_model(
            nn.Sequential(nn.Linear(8, 8)), PstConfig()
        ),
    }
    found = []
    for what, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            found.append((what, f"{type(error).__name__}: {error}"))
        else:
            raise AssertionError(f"this works now, and is no limit any more: {what}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(ARCHITECTURES)}: printed")
    chosen = parser.parse_args(arguments).only
    if unknown := sorted(set(chosen or ()) - set(ARCHITECTURES)):
        parser.error(f"no architecture is called {unknown[0]!r}; there are {', '.join(ARCHITECTURES)}")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for name in chosen or ARCHITECTURES:
        rows.append(try_one(name, ARCHITECTURES[name]))
        print(name, *rows[-1].cells.values(), sep="\t", file=sys.stderr, flush=True)
    text = page(rows, refusals())
    if chosen:
        print(text)
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
