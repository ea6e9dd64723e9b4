"""Finding the answer in a response."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prorl_nemo.rewards.extraction import final_part, last_box, last_code_block, last_tag


@pytest.mark.parametrize(
    ("text", "record", "expected"),
    [
        ("no thought 5", {}, "no thought 5"),
        ("<think>7</think> 5", {}, " 5"),
        ("7</think> 5", {}, " 5"),
        ("a</think>b</think>c", {}, "c"),
        ("<think>7 and so on", {}, ""),
        ("7 and so on", {"thinking": True}, ""),
        ("7</think>5", {"thinking": True}, "5"),
        ("7</think>5<think>6", {}, "5"),
    ],
)
def test_final_part(text: str, record: dict[str, bool], expected: str) -> None:
    assert final_part(text, record) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> 5 </answer>", "5"),
        ("<answer>4</answer> no, <answer>5</answer>", "5"),
        ("<answer>4<answer>5</answer>", "5"),
        ("<answer>5</answer> </answer>", "5"),
        ("<answer>5", None),
        ("5</answer>", None),
        ("</answer><answer>", None),
        ("<answer></answer>", ""),
        ("<answer>a\nb</answer>", "a\nb"),
    ],
)
def test_last_tag(text: str, expected: str | None) -> None:
    assert last_tag(text) == expected


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "x", " ", "\n"]), max_size=12))
def test_last_tag_against_reasoning_gym_s_rule(pieces: list[str]) -> None:
    """The library takes the last lazy match; ours starts at the innermost opening tag."""
    text = "".join(pieces)
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    assert last_tag(text) == (found[-1].strip() if found else None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{3} ... so \boxed{7}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{3} and \boxed{4", None),
        ("7", None),
        (r"\boxed{}", ""),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{a\\\}}", r"a\\\}"),
    ],
)
def test_last_box(text: str, expected: str | None) -> None:
    assert last_box(text) == expected


@given(st.text(alphabet="{}x", max_size=14))
def test_last_box_closes_where_braces_balance(inside: str) -> None:
    depth, end = 1, None
    for position, character in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            end = position
            break
    assert last_box(r"\boxed{" + inside) == (None if end is None else inside[:end].strip())


def test_a_box_longer_than_allowed_is_no_answer() -> None:
    assert last_box(r"\boxed{" + "1" * 100 + "}", max_length=100) == "1" * 100
    assert last_box(r"\boxed{" + "1" * 101 + "}", max_length=100) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\nprint(1)\n```", ("python", "print(1)\n")),
        ("```\na\n```\nthen\n```C++\nb\n```", ("c++", "b\n")),
        ("```python\nprint(1)", ("python", "print(1)")),
        ("```py\na\n```\n```py\nb", ("py", "a\n")),
        ("no code", None),
        ("inline ```x``` only", None),
    ],
)
def test_last_code_block(text: str, expected: tuple[str, str] | None) -> None:
    assert last_code_block(text) == expected


@pytest.mark.parametrize("piece", ["<answer>", r"\boxed{", "```\n", "<think>", "{", "</answer>"])
def test_megabytes_take_linear_time(piece: str) -> None:
    text = piece * (2_000_000 // len(piece))
    start = time.process_time()
    final_part(text)
    last_tag(text)
    last_box(text)
    last_code_block(text)
    # Linear work on 2 MB is a second or less; quadratic would be hours.
    assert time.process_time() - start < 10
