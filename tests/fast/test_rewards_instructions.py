"""Instruction following: the share of instructions met, the same every time."""

from __future__ import annotations

import random
import string
from typing import Any

import pytest

from prorl_nemo.rewards.instructions import _known
from prorl_nemo.rewards.registry import grade
from prorl_nemo.rewards.verdict import GradingError

# Every IFEval kind with arguments, a response that obeys and one that does not.
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["sun", "moon"]}, "Sun and moon.", "Sun."),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, "relation": "at least"},
     "sun sun", "sun"),
    ("keywords:forbidden_words", {"forbidden_words": ["sun"]}, "moon", "the sun"),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"},
     "queue q", "queue"),
    ("language:response_language", {"language": "de"},
     "Dies ist ein deutscher Satz über das Wetter von heute.", "This is an English sentence."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
     "Dr. Smith came. He left.", "Dr. Smith came."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b", "a b c"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, "A b.\n\nThen c.",
     "A b.\n\nNow c."),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "[name]", "name"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi\n\nP.S. bye", "Hi"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Sure."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*so*", "so"),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "Section 1\na\nSection 2\nb", "Section 1\na"),
    ("detectable_format:json_format", {}, '{"a": 1}', "{a: 1"),
    ("detectable_format:title", {}, "<<Title>>\ntext", "Title"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. It.", "It."),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. The end.", "So."),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 2, "capital_relation": "at least"}, "THE SUN rose", "The sun"),
    ("change_case:english_capital", {}, "THIS IS A SENTENCE IN ENGLISH.", "This is not."),
    ("change_case:english_lowercase", {}, "this is a sentence in english.", "This is not."),
    ("punctuation:no_comma", {}, "no", "no, no"),
    ("startend:quotation", {}, '"said"', "said"),
]  # fmt: skip


def record(*instructions: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "kind": "instructions",
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [arguments for _, arguments in instructions],
        **more,
    }


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_every_kind_of_ifeval(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    assert grade(record((name, arguments)), good).score == 1.0
    broken = grade(record((name, arguments)), bad)
    assert (broken.score, broken.reason) == (0.0, f"broken: {name}")


def test_the_cases_cover_ifeval() -> None:
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    assert {name for name, *_ in CASES} == set(INSTRUCTION_DICT)


def test_the_score_is_the_share_of_instructions() -> None:
    item = record(("punctuation:no_comma", {}), ("detectable_format:title", {}))
    verdict = grade(item, "no title")
    assert verdict.score == 0.5
    assert verdict.parts == {"followed": [True, False], "prompt_strict": 0.0}


def test_evaluation_adds_the_loose_figures() -> None:
    """Loose reading drops the first line, here the one with the comma."""
    verdict = grade(record(("punctuation:no_comma", {})), "Sure, here:\nno", training=False)
    assert (verdict.score, verdict.parts["prompt_loose"]) == (0.0, 1.0)


def test_thinking_does_not_count() -> None:
    item = record(("punctuation:no_comma", {}))
    assert grade(item, "<think>a, b</think> ab").score == 1.0
    assert grade(item, "<think>ab").score == 0.0
    assert grade(item, "<think>ab</think>  ").reason.startswith("no answer")


def test_language_detection_is_repeatable() -> None:
    """A short mixed text, on which an unseeded detector answers differently from run to run."""
    item = record(("language:response_language", {"language": "it"}))
    text = "ok bene grazie house"
    assert len({grade(item, text).score for _ in range(30)}) == 1


def test_missing_arguments_are_refused_not_drawn() -> None:
    for name in ("keywords:existence", "length_constraints:number_words"):
        with pytest.raises(GradingError, match="lacks"):
            grade(record((name, {})), "text")


def test_a_sign_is_counted_as_given() -> None:
    """IFEval counts "#" and "!" in two prompts; the library replaces them by a random letter."""
    arguments = {"letter": "#", "let_frequency": 2, "let_relation": "at least"}
    item = record(("keywords:letter_frequency", arguments))
    assert grade(item, "# one # two").score == 1.0
    assert grade(item, string.ascii_letters * 9).score == 0.0


@pytest.mark.parametrize("replaced", [{"letter": "ab"}, {"let_frequency": -1}])
def test_arguments_that_the_library_would_replace_are_refused(replaced: dict[str, Any]) -> None:
    arguments = {"letter": "a", "let_frequency": 2, "let_relation": "at least", **replaced}
    with pytest.raises(GradingError, match=next(iter(replaced))):
        grade(record(("keywords:letter_frequency", arguments)), "text")


def test_null_arguments_count_as_missing() -> None:
    arguments = {"relation": "at least", "num_words": None}
    with pytest.raises(GradingError, match="num_words"):
        grade(record(("length_constraints:number_words", arguments)), "text")


def test_grading_draws_no_random_numbers() -> None:
    state = random.getstate()
    for name, arguments, good, _ in CASES:
        grade(record((name, arguments)), good)
    assert random.getstate() == state


@pytest.mark.parametrize(
    "item",
    [
        record(("no:such_kind", {})),
        record(),
        {"kind": "instructions", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        {"kind": "instructions", "instruction_id_list": "punctuation:no_comma", "kwargs": [{}]},
        record(("keywords:existence", {"nonsense": 1})),
        {"kind": "instructions", "instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]},
        {"kind": "instructions", "instruction_id_list": [["punctuation:no_comma"]], "kwargs": [{}]},
        record(("length_constraints:number_words", {"num_words": 1, "relation": "about"})),
    ],
)
def test_malformed_records(item: dict[str, Any]) -> None:
    with pytest.raises(GradingError):
        grade(item, "text")


def test_ifbench_kinds_that_need_no_data_are_known() -> None:
    item = record(("count:numbers", {"N": 2}), ("format:no_whitespace", {}))
    assert grade(item, "12 and 34").parts["followed"] == [True, False]
    assert len(_known()) == 25 + 58


def test_data_that_is_not_installed_is_named() -> None:
    """Stop words come from NLTK's corpora, which no package carries."""
    import nltk

    try:
        nltk.data.find("corpora/stopwords")
    except LookupError:
        with pytest.raises(GradingError, match="corpora/stopwords"):
            grade(record(("ratio:stop_words", {"percentage": 50})), "text")
    else:
        assert grade(record(("ratio:stop_words", {"percentage": 100})), "the sun").score == 1.0


@pytest.mark.parametrize(
    "text",
    ["\x00", "\ud800", "'" * 5000, "*" * 5000, "\n" * 5000, "[" * 5000, "<<" * 5000],
)
def test_odd_texts_get_a_score(text: str) -> None:
    for name, arguments, *_ in CASES:
        assert grade(record((name, arguments)), "x" + text).score in (0.0, 1.0)
