"""What a recipe's YAML means: numbers, duplicate keys, overrides, variables, nearest names."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.training.values import (
    check_keys,
    check_type,
    parse_yaml,
    read_yaml,
    with_environment,
    with_overrides,
)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_spelling_of_a_float_is_a_number(value):
    for text in (repr(value), f"{value:e}", f"{value:.0e}"):
        assert isinstance(parse_yaml(text, "test"), (int, float)), text
        assert float(parse_yaml(text, "test")) == float(text)


@pytest.mark.parametrize(
    ("text", "value"), [("4e-3", 0.004), ("1E5", 1e5), ("-2e2", -200.0), ("12", 12), ("e3", "e3")]
)
def test_numbers(text, value):
    assert parse_yaml(text, "test") == value


@pytest.mark.parametrize("text", ["2:4", "1:30", "1:30.5", "no", "Yes", "on", "OFF", "2026-01-31", "12:30:00"])
def test_strings_that_yaml_1_1_reads_as_something_else(text):
    assert parse_yaml(text, "test") == text
    assert with_overrides({}, [f"prune.pattern={text}"]) == {"prune": {"pattern": text}}


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("1_000", 1000), ("0x1F", 31),
     (".5", 0.5), ("-.inf", float("-inf")), ("1.", 1.0), ("'2'", "2"), ("[no, 1]", ["no", 1])],
)  # fmt: skip
def test_other_plain_values(text, value):
    found = parse_yaml(text, "test")
    assert found == value and type(found) is type(value)


def test_a_key_given_twice_is_an_error():
    with pytest.raises(ValueError, match="got 'r' again in line 3"):
        parse_yaml("method: spp\nr: 8\nr: 16\n", "test")


def test_keys_that_are_merged_in():
    """Own keys count, and then those of the mapping that is named first; a key is still given once."""
    text = "a: {b: &x {r: 1, <<: &y {r: 2, s: 3}}}\nc: {<<: *x, s: 4}\nd: {<<: [*x, *y]}\n"
    assert parse_yaml(text, "test") == {"a": {"b": {"r": 1, "s": 3}}, "c": {"r": 1, "s": 4}, "d": {"r": 1, "s": 3}}
    for twice in ("a: &x {r: 1}\nb:\n  <<: *x\n  r: 2\n  r: 3\n", "a: &x {r: 1}\nb:\n\n  <<: *x\n  <<: *x\n"):
        with pytest.raises(ValueError, match="again in line 5"):
            parse_yaml(twice, "test")
    with pytest.raises(ValueError, match=r"got something else: `<<` takes a mapping or several in line 1, column 9"):
        parse_yaml("a: {<<: 3}", "test")


@pytest.mark.parametrize(("content", "message"), [("a: [", "is YAML"), ("- a", "got list"), (None, "cannot be read")])
def test_a_file_that_is_no_recipe(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_yaml(path)


def test_overrides_leave_the_original_alone():
    values = {"a": {"b": [1], "c": 2}, "d": None}
    changed = with_overrides(values, ["a.b=[1, 2]", "a.new.deep=x=y", "d.e=true"])
    assert changed == {"a": {"b": [1, 2], "c": 2, "new": {"deep": "x=y"}}, "d": {"e": True}}
    assert values == {"a": {"b": [1], "c": 2}, "d": None}


@pytest.mark.parametrize("override", ["a", "=3", "a..b=3", "a.c.d=3"])
def test_overrides_that_are_none(override):
    with pytest.raises(ValueError, match="An override"):
        with_overrides({"a": {"c": 2}}, [override])


def test_variables(monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", "there")
    values = {"m": {"path": "${SOME_FOLDER}/x", "other": ["${NOT_SET:-here}", 3]}}
    assert with_environment(values) == {"m": {"path": "there/x", "other": ["here", 3]}}
    assert with_environment("${package:peft_sparse}/cli").endswith("peft_sparse/cli")
    with pytest.raises(ValueError, match=r"no environment variable NOT_SET; set it, or .*--set m\.path="):
        with_environment({"m": {"path": "${NOT_SET}/x"}})
    with pytest.raises(ValueError, match="no package not_a_package_at_all"):
        with_environment({"m": {"path": "${package:not_a_package_at_all}/x"}})


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3), ("3", int | None, 3), ("3", str | None, "3"), ("1e-3", float, 1e-3), ("007", str, "007"),
        ("true", bool, True), ("true", str, "true"), ("null", int | None, None), ("long", int, "long"),
        ("2:4", Any, "2:4"), ("4", Any, 4), ("[a, 1]", Any, ["a", 1]), ("/a: b/c", str, "/a: b/c"),
        ("[a", Any, "[a"), ("'3'", Any, "'3'"),
    ],
)  # fmt: skip
def test_a_variable_that_is_a_whole_value_is_read_as_yaml(monkeypatch, text, hint, value):
    monkeypatch.setenv("SOME_VALUE", text)
    read = with_environment({"m": {"a": "${SOME_VALUE}", "b": "${SOME_VALUE}/x"}}, hints={"m.a": hint})["m"]
    assert read == {"a": value, "b": f"{text}/x"} and type(read["a"]) is type(value)
    assert with_environment({"a": f"${{NOT_SET:-{text}}}"}, hints={"a": hint}) == {"a": value}


def test_unknown_keys_get_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'max_steps'"):
        check_keys("training", ["maxsteps"], ["max_steps", "seed"])
    with pytest.raises(ValueError, match="its keys are max_steps, seed"):
        check_keys("training", ["zzz"], ["max_steps", "seed"])


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (3, int, True),
        (True, int, False),
        (3, float | None, True),
        (None, float | None, True),
        ("3", float, False),
        (["a"], str | list[str] | None, True),
        ([3], str | list[str] | None, False),
        (1, bool, False),
        ({"a": 1}, dict[str, int], True),
        ({"a": "b"}, dict[str, int], False),
    ],
)
def test_types(value, hint, fits):
    if fits:
        check_type("x", value, hint)
    else:
        with pytest.raises(ValueError, match="`x` is"):
            check_type("x", value, hint)
