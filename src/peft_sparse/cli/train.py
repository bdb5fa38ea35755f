"""`peft-sparse finetune`."""

from __future__ import annotations

import argparse
import gc
from typing import Any

from peft_sparse.cli._options import Outcome, add_command, add_dry_run

EXAMPLES = """\
  peft-sparse finetune configs/spp_causal_lm.yaml
  peft-sparse finetune configs/spp_causal_lm.yaml --set training.max_steps=20 --set adapter.r=32
  peft-sparse finetune configs/spp_causal_lm.yaml --set model.path=./pruned --dry-run
  peft-sparse finetune configs/pst_bert_base_glue.yaml --resume
  accelerate launch -m peft_sparse_cli finetune configs/spp_llama_7b.yaml     on several devices

A recipe has the parts model, prune, adapter, data, training, evaluation and output; see configs/ for commented ones.
`--set PART.KEY=VALUE` replaces a value; ${VARIABLE} in a value is taken from the environment.
"""


def add_commands(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "finetune",
        run,
        "fine-tune a model as a recipe says: PST or SPP",
        "Load, prune if the recipe says so, adapt, train with transformers' Trainer, evaluate, merge and verify.",
        EXAMPLES,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the recipe",
        dest="overrides",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        type=_checkpoint,
        metavar="CHECKPOINT",
        help="go on from the last complete checkpoint in training.output_dir, or from this one",
    )
    add_dry_run(parser)


def _checkpoint(text: str) -> str:
    """Raises:
    ArgumentTypeError: for a recipe, which was meant to be the other argument."""
    if text.endswith((".yaml", ".yml")):
        raise argparse.ArgumentTypeError(f"should be a checkpoint's folder, got {text!r}; put the recipe before it")
    return text


def run(options: argparse.Namespace) -> Outcome:
    """Train, or say what would be trained."""
    from accelerate import PartialState

    from peft_sparse.cli.measure import table
    from peft_sparse.training import finetune, load_recipe, plan_finetune

    overrides = [*options.overrides, *(["training.disable_tqdm=true"] if options.quiet else [])]
    recipe = load_recipe(options.config, overrides)
    if options.dry_run:
        plan = plan_finetune(recipe, options.resume)
        text = table(plan) + "\n(dry run, nothing was trained or written)"
        return Outcome(plan | {"dry_run": True}, text, printed=PartialState().is_main_process)
    result = finetune(recipe, options.resume)
    # Else nccl may wait at the exit for processes that are gone already, and gloo's threads may abort the interpreter
    # that ends before they do. They end with the group, once no model holds it.
    gc.collect()
    state = PartialState()
    state.destroy_process_group()
    data = {key: value for key, value in result.to_dict().items() if key != "log"}  # that is in result.json
    return Outcome(data, str(result), printed=state.is_main_process)
