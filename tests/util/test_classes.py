"""Classes by name and number: what is found, what is ambiguous, and how held-out classes are matched."""

import unicodedata

import pytest

from util.data.classes import check_classes, find_classes, readable
from util.errors import UserError

IMAGENET = readable([str(label) for label in range(1000)])
CAFE = "caf\u00e9"  # composed


def decomposed(name: str) -> str:
    return unicodedata.normalize("NFD", name)


@pytest.mark.parametrize(
    "asked, names, label",
    [
        ("cardigan", IMAGENET, 474),  # not the corgi, 264, one of whose names it is
        ("Maillot", IMAGENET, 638),
        ("garter snake", IMAGENET, 57),
        ("134", IMAGENET, 134),
        ("a", ["A", "a"], 1),
        ("A", ["a", "b"], 0),
        ("3", ["1", "2", "3"], 2),  # a name goes before a number
        ("1", ["1", "2", "3"], 0),
        ("2", ["cat", "dog", "emu"], 2),
        ("dog", ["0 dog", "1 cat"], 0),  # as a data set in rows names them
        ("1 cat", ["0 dog", "1 cat"], 1),
        (decomposed(CAFE), [CAFE, "tea"], 0),
        (CAFE, [decomposed(CAFE), "tea"], 0),
    ],
)
def test_a_whole_name_goes_before_a_part_and_a_number(asked, names, label):
    assert find_classes([asked], names) == [label]


@pytest.mark.parametrize(
    "asked, names, candidates",
    [
        ("crane", IMAGENET, r"crane \(number 134\); crane \(number 517\)"),
        (
            "grass snake",
            IMAGENET,
            r"green snake, grass snake \(number 55\); garter snake, grass snake \(number 57\)",
        ),
        ("1", ["01", "02"], r"01 \(number 0\); 02 \(number 1\)"),
        ("b", ["A", "B", "B "], r"B \(number 1\); B  \(number 2\)"),
    ],
)
def test_ambiguous_names_are_refused_with_their_numbers(asked, names, candidates):
    with pytest.raises(UserError, match=f"class '{asked}' may be {candidates}: type"):
        find_classes([asked], names)


def test_a_name_that_is_another_classes_number_is_logged(caplog):
    with caplog.at_level("INFO", logger="tokenbridge"):
        find_classes(["1", "0"], ["1", "2"])
    assert (
        caplog.text.count(
            "class 1: using the class of this name, number 0, not 2, which has this number"
        )
        == 1
    )
    assert "class 0" not in caplog.text


TEN = [f"class{label}" for label in range(11)]
NUMBERS = sorted(str(label) for label in range(11))  # 0, 1, 10, 2, ...


@pytest.mark.parametrize(
    "held_out, trained, labels",
    [
        (NUMBERS, TEN, [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]),
        (
            NUMBERS,
            None,
            [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9],
        ),  # the published checkpoints know no names
        (NUMBERS, NUMBERS, [*range(11)]),
        ([f"{label:02d}" for label in range(11)], NUMBERS, [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 2]),
        (sorted(["a", decomposed(CAFE), "cag"]), sorted(["a", CAFE, "cag"]), [0, 1, 2]),
        (
            sorted(["b", decomposed("\u00e9"), "z"]),
            sorted(["b", "\u00e9", "z"]),
            [0, 2, 1],
        ),  # they sort otherwise
        (["cat", "dog"], ["0 dog", "1 cat"], [1, 0]),
        (["0 dog", "1 cat"], ["cat", "dog"], [1, 0]),
    ],
)
def test_held_out_classes_have_the_labels_of_training(held_out, trained, labels):
    assert check_classes(held_out, len(labels), "val", trained, held_out=True) == labels


def test_training_keeps_the_order_of_the_text():
    assert check_classes(NUMBERS, 11, "train") == [*range(11)]


@pytest.mark.parametrize(
    "held_out, class_num, says",
    [
        (["1", "2", "3"], 3, "numbers, from 1 to 3: they must be different ones of 0 to 2"),
        (["0", "00", "1"], 3, "from 0 to 1: they must be different"),
        (["0", "2"], 3, "has 2 classes, but class_num is 3"),
    ],
)
def test_numbers_that_are_no_labels_are_refused(held_out, class_num, says):
    with pytest.raises(UserError, match=says):
        check_classes(held_out, class_num, "val", ["ant", "bee", "cat"], held_out=True)


def test_names_that_say_nothing_count_in_order_and_are_logged(caplog):
    assert check_classes(["x", "y"], 2, "val", ["cat", "dog"], held_out=True) == [0, 1]
    assert "matched by position, x is cat, ..., y is dog" in caplog.text
