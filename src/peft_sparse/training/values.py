"""The values of a recipe: YAML, `--set` overrides, `${VARIABLE}`s, and what is said of a key or value that is none.

YAML 1.1 reads 4e-3 as a string and takes the last of two equal keys without a word; both are learning rates lost. It
reads 2:4 as 124, to the base 60, and `no` as False. Here 4e-3 is a number, a key that is there twice is an error, and
2:4, no, yes, on, off and dates are strings, as in YAML 1.2.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import yaml

_MERGE = "tag:yaml.org,2002:merge"
_VARIABLE = re.compile(r"\$\{(package:)?(\w+)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's numbers and without duplicate keys."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: list[Any] = []
        for key, _ in node.value:
            name = "<<" if key.tag == _MERGE else self.construct_object(key, deep=True)
            if name in names:
                line = key.start_mark.line + 1
                raise ValueError(f"A key is given once, got {name!r} again in line {line}; leave one of them out.")
            names.append(name)
        merged = [pair for key, value in node.value if key.tag == _MERGE for pair in _pairs_of(value)]
        node.value = [pair for pair in node.value if pair[0].tag != _MERGE]
        for key, value in merged:  # here, since PyYAML 6.0.4 lets a merged key of one letter win over a mapping's own
            name = self.construct_object(key, deep=True)
            if name not in names:
                names.append(name)
                node.value.append((key, value))
        return node


def _pairs_of(merged: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
    """What `<<` brings in: the pairs of a mapping, or of several, of which an earlier one counts."""
    mappings = merged.value if isinstance(merged, yaml.SequenceNode) else [merged]
    for mapping in mappings:
        if not isinstance(mapping, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="`<<` takes a mapping or several", problem_mark=mapping.start_mark)
    return [pair for mapping in mappings for pair in mapping.value]


_PLAIN = {  # what is no string: a pattern, and the signs that it starts with
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+|[-+]?[0-9][0-9_]*\.[0-9_]*|[-+]?\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "timestamp": None,
}
_TAGS = {f"tag:yaml.org,2002:{name}": how for name, how in _PLAIN.items()}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _TAGS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _how in _TAGS.items():
    if _how is not None:
        _Loader.add_implicit_resolver(_tag, re.compile(f"^({_how[0]})$"), list(_how[1]))


def parse_yaml(text: str, where: str) -> Any:
    """Plain values.

    Args:
        text: of YAML.
        where: it is from, for messages.

    Raises:
        ValueError: if it is no YAML, or a key is there twice.

    Examples:
        >>> parse_yaml("{learning_rate: 4e-3, steps: 10}", "a test")
        {'learning_rate': 0.004, 'steps': 10}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is YAML, got something else: {_said(error, where)}.") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _said(error: yaml.YAMLError, where: str) -> str:
    """PyYAML's reason without its drawing, which is of several lines."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
    return f"{problem}{place}" if problem else " ".join(str(error).replace("<unicode string>", where).split())


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        ValueError: if there is no such file, or no mapping in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"A recipe is a YAML file, got {str(path)!r}, which cannot be read ({error}).") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"A recipe maps its parts to their settings, got {type(values).__name__} in {str(path)!r}.")
    return values


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy with some values replaced; the order counts.

    Args:
        values: nested mappings.
        overrides: such as "training.learning_rate=1e-3"; what is right of the first "=" is YAML.

    Raises:
        ValueError: if one has another form, or goes through a value that is no mapping.

    Examples:
        >>> with_overrides({"data": {"text": "line"}}, ["data.max_length=64", "prune=null"])
        {'data': {'text': 'line', 'max_length': 64}, 'prune': None}
    """
    result = _copy(values)
    for override in overrides:
        path, sign, text = override.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not sign or not all(keys):
            raise ValueError(f"An override is PART.KEY=VALUE, got {override!r}; such as training.learning_rate=1e-3.")
        place = result
        for depth, key in enumerate(keys[:-1]):
            inner = place.setdefault(key, {})
            if inner is None:
                inner = place[key] = {}
            if not isinstance(inner, dict):
                raise ValueError(
                    f"An override sets a key of a mapping, got {override!r}, where {'.'.join(keys[: depth + 1])} is "
                    f"{inner!r}."
                )
            place = inner
        place[keys[-1]] = parse_yaml(text, f"the value of {override!r}")
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def with_environment(value: Any, where: str = "", hints: Mapping[str, Any] | None = None) -> Any:
    """A copy in which `${VARIABLE}` and `${VARIABLE:-default}` are replaced in all strings, and `${package:name}` by
    the folder of an installed Python package, which is not imported. A variable that is a whole value is read as YAML:
    a number, say, but where text is wanted.

    Args:
        where: the key's path so far.
        hints: the types of keys by their paths, as far as they are known.

    Raises:
        ValueError: for a variable that is not set or a package that is not installed, and no default.

    Examples:
        >>> with_environment({"path": "${NOT_SET_ANYWHERE:-models}/llama"})
        {'path': 'models/llama'}
    """
    if isinstance(value, Mapping):
        return {key: with_environment(inner, f"{where}.{key}".lstrip("."), hints) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_environment(inner, where, hints) for inner in value]
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        found = _package_folder(match[2]) if match[1] else os.environ.get(match[2])
        found = found or match[3]
        if found is None and match[1]:
            raise ValueError(
                f"`{where}` is {value!r}, got no package {match[2]}; install it, or replace the whole value with "
                f"`--set {where}=...`."
            )
        if found is None:
            raise ValueError(
                f"`{where}` is {value!r}, got no environment variable {match[2]}; set it, or replace the whole value "
                f"with `--set {where}=...`."
            )
        return found

    text = _VARIABLE.sub(replaced, value)
    return _as_yaml(text, (hints or {}).get(where, Any)) if _VARIABLE.fullmatch(value) else text


def _as_yaml(text: str, hint: Any) -> Any:
    """What YAML makes of a text, if it is something else than text, of the type that is wanted."""
    try:
        value = parse_yaml(text, "a variable")
    except ValueError:
        return text
    return text if isinstance(value, str) or not _fits(value, hint) else value


def _package_folder(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    places = (spec.submodule_search_locations if spec else None) or []
    return next(iter(places), None)


def check_keys(where: str, keys: Iterable[Any], known: Iterable[str]) -> None:
    """Raises:
    ValueError: for a key that is not known, with the nearest one that is.

    Examples:
        >>> check_keys("training", ["learning_rat"], ["learning_rate", "max_steps"])
        Traceback (most recent call last):
        ValueError: `training` has no key 'learning_rat'; did you mean 'learning_rate'?
    """
    known = sorted(known)
    for key in keys:
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        if near:
            hint = f"; did you mean {near[0]!r}?"
        else:
            hint = f"; its keys are {', '.join(known[:20])}{' and more' if len(known) > 20 else ''}."
        raise ValueError(f"`{where}` has no key {key!r}{hint}")


def check_type(where: str, value: Any, hint: Any) -> None:
    """Raises:
    ValueError: for a value of another type; integers count as floats, booleans as neither.

    Examples:
        >>> check_type("data.max_length", "long", int | None)
        Traceback (most recent call last):
        ValueError: `data.max_length` is int or None, got 'long'.
    """
    if not _fits(value, hint):
        raise ValueError(f"`{where}` is {_spelled(hint)}, got {value!r}.")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_is_instance(value, option) for option in _options(hint))


def _is_instance(value: Any, kind: Any) -> bool:
    """Whether a value is of one type, not of a union; members of lists and dictionaries too."""
    plain, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if plain is Any:
        return True
    if plain in (int, float):
        return isinstance(value, int if plain is int else (int, float)) and not isinstance(value, bool)
    if not isinstance(plain, type) or not isinstance(value, plain):
        return False
    members: Any = value
    if plain is list and inner:
        return all(_fits(item, inner[0]) for item in members)
    if plain is dict and inner:
        return all(_fits(item, inner[1]) for item in members.values())
    return True


def _spelled(hint: Any) -> str:
    names = []
    for option in _options(hint):
        plain, inner = typing.get_origin(option) or option, typing.get_args(option)
        name = "None" if plain is type(None) else getattr(plain, "__name__", str(plain))
        names.append(f"{name} of {_spelled(inner[-1])}" if inner and plain in (list, dict) else name)
    return " or ".join(names)
