"""The words of the command line before jsonargparse reads them, and lists of integers."""

import pytest

from diffcore.cli.arguments import extract_option, normalize_options
from diffcore.cli.sample_request import IntegerList


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("7", [7]),
        ("0-3", [0, 1, 2, 3]),
        ("3,0-1,3", [3, 0, 1, 3]),
        (" 1 , 2 ", [1, 2]),
        (5, [5]),
        ([1, "2-3"], [1, 2, 3]),
    ],
)
def test_integers_are_listed_singly_or_by_inclusive_ranges_in_order(text, numbers):
    assert list(IntegerList.parse(text)) == numbers
    assert IntegerList.parse(str(IntegerList.parse(text))) == IntegerList.parse(text)


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,,2", "1.5", "0x1"])
def test_text_that_is_no_list_of_integers_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a number or a range such as 0-9|runs backwards"):
        IntegerList.parse(text)


def test_a_range_of_too_many_integers_is_refused_before_they_are_listed():
    with pytest.raises(
        ValueError, match="has 100,000,000,000 integers, expected at most 1,000,000"
    ):
        IntegerList.parse("0-99999999999")


def test_dashes_become_underscores_in_option_names_and_stay_in_values():
    argv = ["--per-label", "a-b", "--batch-size=c-d", "-x-y", "--a.b-c=--d-e"]
    assert normalize_options(argv) == [
        "--per_label",
        "a-b",
        "--batch_size=c-d",
        "-x-y",
        "--a.b_c=--d-e",
    ]


def test_a_repeated_option_is_taken_out_and_its_values_are_not_read_as_yaml():
    argv = ["pipe", "--prompt", "[1, 2]", "--steps=3", "--prompt=a: b=c", "--prompt", "--x"]
    prompts, others = extract_option(argv, "prompt", "a text")
    assert prompts == ["[1, 2]", "a: b=c", "--x"]
    assert others == ["pipe", "--steps=3"]


def test_an_empty_value_is_a_value_only_where_the_option_allows_it():
    assert extract_option(["--prompt="], "prompt", "a text", may_be_empty=True) == ([""], [])
    with pytest.raises(ValueError, match="--trust expects a name"):
        extract_option(["--trust="], "trust", "a name")


def test_an_option_without_a_value_is_refused():
    with pytest.raises(ValueError, match="--prompt expects a text"):
        extract_option(["pipe", "--prompt"], "prompt", "a text", may_be_empty=True)
