"""The labels of a classifier: how many, what they are called, and which one a row has.

A value is first looked up among the names, whatever type it has: labels that are called 1 and 0, in this order, are no
class numbers. Only a number that is no name is the number of a class, and only where no name is a number. A column
whose numbers have names in the data set (a `datasets.ClassLabel`) goes by those: MNLI counts from "entailment" on,
where a model may count from "contradiction" on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_sparse.training.parts import DataPart, ModelPart
from peft_sparse.training.texts import Row, shown


def label_names(labels: Iterable[Any]) -> list[str]:
    """What labels of a recipe are called in a model's config.json.

    Examples:
        >>> label_names(["low", 1, True])
        ['low', '1', 'True']
    """
    return [next(_spellings(label), str(label)) for label in labels]


def check_labels(data: DataPart, model: ModelPart) -> None:
    """Raises:
    ValueError: if what `data.labels` lists could not be told apart, or is another number than `model.num_labels`."""
    if data.labels is None:
        return
    names = label_names(data.labels)
    twice = next((label for index, label in enumerate(data.labels) if names[index] in names[:index]), None)
    if len(names) < 2 or twice is not None:
        got = f"{twice!r} twice" if twice is not None else f"{data.labels}"
        raise ValueError(
            f"`data.labels` lists the labels in the order of their numbers, at least two and each once, got {got}; "
            "leave it out where labels are numbers."
        )
    odd = [label for label in data.labels if not isinstance(label, (str, int, float))]
    if odd:
        raise ValueError(f"`data.labels` lists strings, numbers or truth values, got {odd[0]!r}; name the label.")
    if model.num_labels is not None and model.num_labels != len(names):
        raise ValueError(
            f"`model.num_labels` is the number of `data.labels`, got {model.num_labels} and {len(names)} of them "
            f"({data.labels}); leave `model.num_labels` out, or `data.labels` where a number is the target (1)."
        )


@dataclass(frozen=True)
class Labels:
    """Attributes:
    column: of the rows.
    count: of classes; 1 for a number as the target.
    names: the numbers of the classes by name.
    listed: the names are those of `data.labels`, and not the model's own.
    in_data: what the column's numbers are called in the data; empty if they have no names, or none of these.
    """

    column: str
    count: int
    names: Mapping[str, int]
    listed: bool
    in_data: Sequence[str] = ()

    @classmethod
    def of(cls, data: DataPart, model: ModelPart, own: Mapping[str, int]) -> Labels:
        """Those of a recipe.

        Args:
            own: the model's own names, see `own_labels`.
        """
        listed = data.labels is not None
        names = {name: number for number, name in enumerate(label_names(data.labels))} if data.labels else dict(own)
        count = model.num_labels or len(names) or 2
        return cls(str(data.label), count, names if len(names) == count else {}, listed)

    def of_column(self, feature: Any) -> Labels:
        """The same for rows whose column has names for its numbers.

        Args:
            feature: that `datasets` has for the column; None: there is no telling.
        """
        in_data = getattr(feature, "names", None) or ()
        if not in_data or not self.names or self.count == 1:
            return self
        if any(self._of_name(name) is not None for name in in_data):
            return replace(self, in_data=in_data)
        if any(name != f"LABEL_{number}" for name, number in self.names.items()):
            warnings.warn(
                f"The labels in column {self.column!r} are called {', '.join(in_data)} in the data, and "
                f"{', '.join(self.names)} {'in `data.labels`' if self.listed else 'by the model'}, so they are taken "
                "by their numbers.",
                stacklevel=2,
            )
        return self

    def _of_name(self, name: str) -> int | None:
        """The number of a name of the data's; models write some in capitals."""
        if name in self.names:
            return self.names[name]
        return next((number for own, number in self.names.items() if own.lower() == name.lower()), None)

    def number(self, row: Row) -> int | float:
        """The number of a row's class, or the target.

        Raises:
            ValueError: if the row has no label, or another one than the model has."""
        value = row[self.column]
        if value is None:
            raise ValueError(
                f"A row has a label, got None in column {self.column!r} of the row {shown(row)}; leave out rows "
                "without a label."
            )
        if self.count == 1:
            return self._target(row)
        if self.in_data and isinstance(value, int) and 0 <= value < len(self.in_data):
            return self._number_in_data(row)
        for name in _spellings(value):
            if name in self.names:
                return self.names[name]
        return self._number_without_name(row)

    def _number_in_data(self, row: Row) -> int:
        name = self.in_data[row[self.column]]
        found = self._of_name(name)
        if found is None:
            raise ValueError(
                f"A label is one of {', '.join(self.names)}, got {name!r} in column {self.column!r} of the row "
                f"{shown(row)}; list all labels in `data.labels`, or leave out such rows."
            )
        return found

    def _number_without_name(self, row: Row) -> int:
        value = row[self.column]
        where = f"got {value!r} in column {self.column!r}"
        number = _parsed(value) if isinstance(value, str) else value
        numbered = any(_parsed(name) is not None for name in self.names)
        if self.listed and (numbered or not isinstance(number, (int, float))):
            raise ValueError(f"`data.labels` lists the labels, {where} besides, of the row {shown(row)}; add it.")
        if numbered:
            raise ValueError(
                f"The model's own names {', '.join(self.names)} count, and numbers among them leave none for classes "
                f"without a name, {where} of the row {shown(row)}; name the label as the model does."
            )
        if not isinstance(number, (int, float)):
            names = f" or one of the model's names {', '.join(self.names)}" if self.names else ""
            raise ValueError(
                f"A label is a number{names}, {where}; list the names in `data.labels`, in the order of their numbers."
            )
        if not float(number).is_integer() or not 0 <= number < self.count:
            if self.listed:
                raise ValueError(
                    f"A label is one of `data.labels`, or its number, from 0 to {self.count - 1}, {where} of the row "
                    f"{shown(row)}; list all labels, or leave out rows without one."
                )
            raise ValueError(
                f"A label of {self.count} classes is from 0 to {self.count - 1}, {where} of the row {shown(row)}; set "
                "`model.num_labels`, 1 for a number as the target, list the labels that there are in `data.labels` "
                "([1, 2]), or leave out rows without a label."
            )
        return int(number)

    def _target(self, row: Row) -> float:
        value = row[self.column]
        if not isinstance(value, (int, float)):
            raise ValueError(
                f"A label is a number where it is the target, got {value!r} in column {self.column!r} of the row "
                f"{shown(row)}; set `model.num_labels` for classes, and list their names in `data.labels`."
            )
        if not math.isfinite(value):
            raise ValueError(
                f"A number as the target is finite, got {value!r} in column {self.column!r}; leave out such rows."
            )
        return float(value)


def _spellings(value: Any) -> Iterator[str]:
    """What a label may be called: 1.0 is called 1, as a column with a gap has it, and True also true or 1."""
    if isinstance(value, str):
        yield value
        value = _parsed(value)
    if isinstance(value, bool):
        yield from (str(value), str(value).lower(), str(int(value)))
    elif isinstance(value, (int, float)):
        yield str(int(value)) if float(value).is_integer() else str(value)


def _parsed(text: str) -> bool | int | float | None:
    """The number or truth value that a text is, as a file without types has it."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else number
