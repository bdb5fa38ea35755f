"""`make demo`: the package's main job on real models, in about a quarter of an hour on two CPU cores.

Part (a), a language model: prune, tune with SPP, merge, save, reload. Part (b), an encoder: sparsify while fine-tuning
with PST, beside its baselines. Ends with tables of what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_sparse.cli import _demo_data as data
from peft_sparse.cli import _demo_tables as tables

EPILOG = """\
examples:
  make demo                                       both parts
  make demo ARGS="--only sentiment --steps 300"   one part, trained for longer
  python -m peft_sparse.cli.demo --model Qwen/Qwen3-0.6B --dataset Salesforce/wikitext --config-name wikitext-2-raw-v1
                                                  a model and a text from the Hugging Face Hub
  python -m peft_sparse.cli.demo --model ./my-model --dataset my-text.txt
                                                  a model and a text of your own
"""
# --quick is a test that everything runs; what it measures means nothing.
LANGUAGE_MODEL_STEPS, SENTIMENT_STEPS, QUICK_STEPS = 32, 120, 2
HELD_OUT_EXAMPLES, QUICK_EXAMPLES = 2000, 64
# More than enough characters of English for the windows of 256 tokens that training and evaluation take.
CHARACTERS_PER_TOKEN = 6


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_sparse.cli.demo",
        description="Prune, tune, merge, save and reload a language model (SPP); sparsify an encoder while\n"
        "fine-tuning it (PST). Ends with tables of what was measured, after about a quarter of an hour on two\n"
        "CPU cores.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=["llm", "sentiment"], help="run one of the two parts")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="a causal language model; runs part llm alone")
    parser.add_argument(
        "--dataset", metavar="NAME", help="its text: a data set on the Hub (split train), or a text file"
    )
    parser.add_argument(
        "--config-name", metavar="NAME", help="the data set's configuration, such as wikitext-2-raw-v1"
    )
    parser.add_argument("--text-column", metavar="NAME", default="text", help="the data set's column (default: text)")
    parser.add_argument(
        "--steps",
        type=_positive_integer,
        metavar="N",
        help=f"training steps of every row (default: {LANGUAGE_MODEL_STEPS} llm, {SENTIMENT_STEPS} sentiment)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    parser.add_argument(
        "--output", type=Path, default=Path(".demo"), metavar="FOLDER", help="for models and results (default: .demo)"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps on little data: a test that everything runs")
    parsed = parser.parse_args(arguments)
    if parsed.model or parsed.dataset:
        if parsed.only == "sentiment":
            parser.error("--model and --dataset are for the language model; leave out --only sentiment")
        parsed.only = "llm"
    return parsed


def _positive_integer(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"should be above 0, got {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = parse_arguments(arguments)
    # Here, since they import torch and transformers: --help should not take seconds.
    from peft_sparse.cli._demo_training import known_warnings_hidden

    start = time.perf_counter()
    results: dict[str, Any] = {"seed": options.seed, "quick": options.quick}
    results_file = options.output / "results.json"
    printed = []
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for part, run in (("llm", run_language_model), ("sentiment", run_sentiment)):
            if options.only in (None, part):
                with known_warnings_hidden():
                    results[part], table = run(options)
                printed.append(table)
                results["seconds"] = time.perf_counter() - start
                # a part is kept if the next one fails
                results_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    except data.DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n\n" + "\n\n\n".join(printed))
    print(f"\nAll numbers: {results_file} ({results['seconds'] / 60:.1f} minutes in all)")
    return 0


def run_language_model(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Part (a): what was measured, and its table."""
    cache = options.output / "data"
    model = options.model or str(data.language_model_folder(cache))
    from peft_sparse.cli import _demo_language_model as part

    steps = options.steps or (QUICK_STEPS if options.quick else LANGUAGE_MODEL_STEPS)
    size = {"calibration_windows": 2, "held_out_windows": 2} if options.quick else {}
    settings = part.Settings(model, options.output, steps=steps, seed=options.seed, **size)
    if options.dataset:
        source = options.dataset
        length = settings.windows * part.MAX_WINDOW * CHARACTERS_PER_TOKEN
        documents = data.documents_of_dataset(options.dataset, options.config_name, options.text_column, length)
    else:
        source = "New York Times editorials from the source package vaderSentiment 3.3.2"
        documents = data.editorials(data.rated_text(data.EDITORIALS, cache))
    text = part.cut_text(settings, documents)
    print(f"\nLanguage model: {model}, {steps} training steps for each row", flush=True)
    result = {
        "model": model,
        "text": source,
        "train_tokens": text.train.numel(),
        "held_out_tokens": text.held_out.numel(),
        "calibration_tokens": text.calibration.numel(),
        "window": text.window,
        "batch_size": part.BATCH_SIZE,
        "steps": steps,
        "rows": [asdict(row) for row in part.run(settings, text)],
    }
    return result, tables.language_model(result)


def run_sentiment(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Part (b): what was measured, and its table."""
    model = str(data.encoder_folder())
    ratings = data.rated_text(data.MOVIES, options.output / "data")
    train, held_out = data.movie_examples(ratings, QUICK_EXAMPLES if options.quick else HELD_OUT_EXAMPLES)
    from peft_sparse.cli import _demo_sentiment as part

    steps = options.steps or (QUICK_STEPS if options.quick else SENTIMENT_STEPS)
    settings = part.Settings(model, train, held_out, options.output, steps=steps, seed=options.seed)
    print(f"\nSentiment: all-MiniLM-L6-v2, {steps} training steps for each row", flush=True)
    result = {
        "model": "all-MiniLM-L6-v2",
        "train_examples": len(train),
        "held_out_examples": len(held_out),
        "majority": part.majority(held_out),
        "steps": steps,
        "batch_size": settings.batch_size,
        "rows": [asdict(row) for row in part.run(settings)],
    }
    return result, tables.sentiment(result)


if __name__ == "__main__":
    sys.exit(main())
