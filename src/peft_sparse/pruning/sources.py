"""Where rows come from: a file here, several files, or a data set on the Hub, through the package `datasets`.

`datasets` is an optional dependency (the extra `train`), imported when rows are asked for.
"""

from __future__ import annotations

import glob
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What `load_dataset` calls the readers of these files.
READERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# What `datasets`, pandas and Arrow say of files without a row.
_NO_ROWS = ("corresponds to no data", "No columns to parse from file", "BatchSize must be greater than 0, got 0")
_STATE = "state.json"  # what `save_to_disk` writes beside the files of one data set


def load_rows(
    path: str | Path,
    split: str = "train",
    *,
    name: str | None = None,
    files: dict[str, Any] | None = None,
    streaming: bool = False,
    texts: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Rows, as a `datasets.Dataset` or, if they are streamed, an `IterableDataset`.

    Args:
        path: a file (its ending tells the format; it is the whole split whatever its name, and a .txt one document);
            the name of a reader ("json", "parquet"; "text", a row for each line; "csv", with tabs between the columns
            where all files are .tsv) together with `files`; or a data set on the Hub or in a folder, also one that
            `save_to_disk` wrote.
        split: such as "train", or "validation[:100]" where rows are not streamed.
        name: the data set's configuration, such as "wikitext-2-raw-v1".
        files: split to file or files; those of a data set are named from its folder.
        streaming: read rows as they are needed, and keep none.
        texts: columns of CSV files here that are text as it is written, where pandas would see a number (in 00730) or
            a truth value. Then only an empty field is None, in all columns, where pandas would take the words NA and
            None for it, unless `options` say so (`keep_default_na`, `na_values`). A data set on the Hub has types of
            its own.
        **options: for `load_dataset`.

    Raises:
        ValueError: if the rows cannot be had; the message has `datasets`' own reason.
        ImportError: if `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Rows are read by the package `datasets`; `pip install datasets`.") from error
    file, asked = Path(path), str(path)
    if files is not None and f".{asked}" in READERS and asked not in READERS.values():
        raise ValueError(
            f"Rows in files are read by one of {', '.join(sorted(set(READERS.values())))}, got {asked!r}, which "
            f"{READERS[f'.{asked}']!r} reads."
        )
    if streaming and "[" in split:
        raise ValueError(
            f"A stream is read as it comes, so that no part can be taken of it, got the split {split!r}; name a whole "
            f"one, {split.partition('[')[0]!r}, or do not stream."
        )
    if files is None and file.is_file() and file.suffix.lower() not in READERS:
        raise ValueError(
            f"A file's ending tells its format, one of {', '.join(READERS)}, got {asked!r}; rename it, or name a "
            "reader and `files`."
        )
    if files is None and (reader := reader_of(file)) is not None:
        if name is not None:
            raise ValueError(
                f"A name chooses one of several data sets in a repository or a folder, got {name!r} beside {asked!r}, "
                "which is one alone; leave the name out."
            )
        if reader == "text":
            options = {"sample_by": "document"} | options
        files, path = {split.partition("[")[0]: _files_of(file)}, reader
    if str(path) == "csv" and files and all(name.lower().endswith((".tsv", ".tsv.gz")) for name in _flat(files)):
        options = {"sep": "\t"} | options
    if str(path) == "text":
        options = {"encoding": "utf-8-sig"} | options  # the mark with which Windows begins a file is no text
    here = str(path) in READERS.values()
    if here:  # those of a data set in a folder or on the Hub are named from there
        _check_files(_flat(files))
    patterns = None if files is None else {key: _as_patterns(listed, str(path)) for key, listed in files.items()}
    try:
        if texts and _reads_csv(str(path), name, patterns):
            options = _as_written(texts, options)
        return datasets.load_dataset(str(path), name, data_files=patterns, split=split, streaming=streaming, **options)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _no_rows(error, asked, split, here, files, datasets.config.HF_DATASETS_CACHE) from error


def no_row(path: str, split: str) -> ValueError:
    """For a split, or a share of one, that is empty."""
    hint = "; a text file has a row for each line, so name a file for each split" if path == "text" else ""
    return ValueError(f"Data has at least one row, got none in split {split!r} of {path!r}{hint}.")


def _no_rows(
    error: Exception, asked: str, split: str, here: bool, files: dict[str, Any] | None, cache: Path
) -> ValueError:
    """What to say of an error of `datasets`, which keeps the rows that it reads in `cache`."""
    cause = error.__cause__ or error  # `datasets` wraps what a reader says of a file into "an error occurred"
    if isinstance(cause, UnicodeDecodeError):
        return ValueError(
            f"Text is stored as UTF-8, got {', '.join(map(repr, _flat(files))) or repr(asked)} with the byte "
            f"0x{cause.object[cause.start]:02x}, which is none (at a guess latin-1 or UTF-16); store it again as "
            "UTF-8, or name the `encoding` (`data.options.encoding` of a recipe)."
        )
    reason = " ".join(str(cause).split())
    if any(said in reason for said in _NO_ROWS):
        return no_row(asked, split)
    if isinstance(cause, OSError) and not _is_writable(cache):
        return ValueError(
            f"The package `datasets` keeps rows that it reads in a cache, got {str(cache)!r}, where nothing can be "
            f"written ({type(cause).__name__}: {reason}); set the environment variable HF_DATASETS_CACHE to a folder "
            "that can be."
        )
    check = "what is in it" if here else "the names and the connection"
    if type(cause).__name__ == "ParserError":
        check += '; a CSV file with semicolons between its columns needs `options: {sep: ";"}`'
    return ValueError(
        f"Data is a file, a reader's name with `files`, or a data set on the Hub, got {asked!r} (split "
        f"{split!r}), which could not be loaded ({type(cause).__name__}: {reason}); check {check}."
    )


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def reader_of(path: str | Path) -> str | None:
    """The reader of what is one split: a file of its ending, or a folder to which `save_to_disk` wrote one data set
    (None for several splits, whose files `datasets` finds by itself)."""
    path = Path(path)
    if path.is_dir():
        return "arrow" if (path / _STATE).is_file() else None
    return READERS.get(path.suffix.lower())


def _check_files(files: list[str]) -> None:
    for file in files:
        if "://" in file:
            continue
        if any(sign in file for sign in "*?[") and not Path(file).is_file():
            if not glob.glob(file, recursive=True):  # `datasets` would say that it has no features
                raise ValueError(f"Data is in files that are there, got {file!r}, which matches none; check the path.")
        elif not Path(file).is_file():
            raise ValueError(f"Data is in files that are there, got {file!r}, which is none; check the path.")
        elif not Path(file).stat().st_size:
            raise ValueError(f"Data is in files with something in them, got {file!r}, which is empty; check the path.")


def _files_of(path: Path) -> str | list[str]:
    if not path.is_dir():
        return str(path)
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return [str(path / file["filename"]) for file in state["_data_files"]]


def _reads_csv(path: str, name: str | None, files: dict[str, Any] | None) -> bool:
    if not Path(path).is_dir():
        return path == "csv"
    from datasets import load_dataset_builder
    from datasets.packaged_modules.csv.csv import Csv

    return isinstance(load_dataset_builder(path, name, data_files=files), Csv)


def _as_written(texts: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """pandas' options that keep the fields of these columns as they are; a user's own count."""
    gaps = {"keep_default_na": False, "na_values": [""]}
    if options.keys() & {"na_filter", *gaps}:
        gaps = {}
    return {"converters": dict.fromkeys(texts, str)} | gaps | options


def _as_patterns(files: Any, reader: str) -> Any:
    """`datasets` takes names for patterns, relative to a folder that is one too: a file that is there is meant as it
    is called, with brackets in its name or its folder's."""
    if isinstance(files, (list, tuple)):
        return [_as_patterns(file, reader) for file in files]
    if not Path(files).is_file():
        return files
    return glob.escape(str(Path(files).absolute() if reader in READERS.values() else files))


def _flat(files: dict[str, Any] | None) -> list[str]:
    found: list[str] = []
    for value in (files or {}).values():
        found += [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
    return found
