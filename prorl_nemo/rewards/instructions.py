"""Instruction following: which of a prompt's checkable instructions does the response obey?

The checkers are those of IFEval (Zhou et al., 2023; 25 kinds) and IFBench (Pyatkin et al.,
2025), as the if-verifiable package carries them. ProRL rewards and reports the share of
instructions met; the text after the thinking counts. What is ours here is making them
repeatable: no downloads, sentence splitting from a package, a seeded language detector, and
no arguments drawn at random where a record leaves them out.

Two IFBench kinds need data of NLTK's own (its stop words, its tagger); a record that asks
for them is refused where that data is not installed.
"""

from __future__ import annotations

import json
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

from prorl_nemo.rewards.extraction import final_part
from prorl_nemo.rewards.verdict import GradingError, Verdict, zero

# 16,000 tokens, the longest responses that are trained on, are some 64,000 characters.
MAX_RESPONSE = 200_000
_NLTK_DATA = {
    "ratio:stop_words": "corpora/stopwords",
    "words:start_verb": "taggers/averaged_perceptron_tagger_eng",
}


def grade(grading: dict[str, Any], text: str, training: bool = True) -> Verdict:
    """Score the share of instructions that the response follows.

    Args:
        grading: `instruction_id_list` and `kwargs` (one mapping for each), as in the IFEval
            data; `prompt` for the few kinds that refer to it.
        text: the response.
        training: False adds the loose figures of IFEval to the parts (eight times the work).

    Returns:
        Score in [0, 1]; parts: `followed` (a list of booleans), `prompt_strict`, and in
        evaluation `instruction_loose` and `prompt_loose`.

    Raises:
        GradingError: unknown kind, missing arguments, or data that is not installed.
    """
    checkers = _checkers(_key(grading))
    response = final_part(text, grading).strip()
    if not response:
        return zero("no answer: nothing after the thinking")
    if len(response) > MAX_RESPONSE:
        return zero(f"refused: {len(response)} characters, {MAX_RESPONSE} are allowed")
    followed = [_follows(checker, response) for _, checker in checkers]
    score = sum(followed) / len(followed)
    parts: dict[str, Any] = {"followed": followed, "prompt_strict": float(all(followed))}
    if not training:
        variants = _loose_variants(response)
        loose = [
            strict or any(_follows(checker, variant) for variant in variants)
            for strict, (_, checker) in zip(followed, checkers, strict=True)
        ]
        parts |= {"instruction_loose": sum(loose) / len(loose), "prompt_loose": float(all(loose))}
    broken = [name for ok, (name, _) in zip(followed, checkers, strict=True) if not ok]
    return Verdict(score, parts, f"broken: {', '.join(broken)}" if broken else "correct")


def _follows(checker: Any, response: str) -> bool:
    try:
        return bool(response.strip() and checker.check_following(response))
    except Exception:  # the checkers index into splits that odd texts do not have
        return False


def _loose_variants(response: str) -> list[str]:
    """IFEval's loose reading: without the first or last line, without asterisks."""
    lines = response.split("\n")
    cut = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    return [*cut, *(text.replace("*", "") for text in cut)]


def _key(grading: dict[str, Any]) -> str:
    """What the checkers depend on, as text, so that a prompt's 16 responses share them."""
    names, arguments = grading.get("instruction_id_list"), grading.get("kwargs")
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise GradingError("grading.instruction_id_list: must be a list of instruction ids")
    if not (
        isinstance(arguments, list)
        and len(arguments) == len(names)
        and all(given is None or isinstance(given, dict) for given in arguments)
    ):
        raise GradingError(f"grading.kwargs: must be a list of {len(names)} mappings")
    return json.dumps([names, arguments, grading.get("prompt")])


@lru_cache(maxsize=1024)
def _checkers(key: str) -> list[tuple[str, Any]]:
    """(instruction id, ready checker) for each instruction of a record."""
    names, arguments, prompt = json.loads(key)
    return [
        (name, _checker(name, given or {}, prompt))
        for name, given in zip(names, arguments, strict=True)
    ]


def _checker(name: str, given: dict[str, Any], prompt: str | None) -> Any:
    known = _known()
    if name not in known:
        raise GradingError(f"grading.instruction_id_list: {name!r} is no known instruction")
    if name in _NLTK_DATA and not _has_data(_NLTK_DATA[name]):
        raise GradingError(
            f"grading.instruction_id_list: {name} needs NLTK's {_NLTK_DATA[name]}; install it "
            "or leave the prompt out"
        )
    checker = known[name](name)
    arguments = {key: value for key, value in given.items() if value is not None}
    wanted = set(checker.get_instruction_args_keys())
    if "prompt" in wanted and prompt is not None:
        arguments["prompt"] = prompt
    missing = wanted - set(arguments)
    if missing:
        # The library would draw them at random: another instruction than the prompt's.
        raise GradingError(f"grading.kwargs: {name} lacks {', '.join(sorted(missing))}")
    try:
        checker.build_description(**arguments)
    except Exception as error:
        raise GradingError(f"grading.kwargs: {name} refuses {arguments}: {error}") from None
    if name == "keywords:letter_frequency" and len(str(arguments["letter"])) == 1:
        # Two IFEval prompts count a sign ("#", "!"); the library counts a random letter instead.
        checker._letter = str(arguments["letter"]).lower()
    kept = checker.get_instruction_args() or {}
    replaced = [key for key in arguments if key in kept and not _same(arguments[key], kept[key])]
    if replaced:
        raise GradingError(f"grading.kwargs: {name} cannot use {', '.join(replaced)} as given")
    return checker


def _same(given: Any, kept: Any) -> bool:
    """Whether a checker kept an argument; it may sort lists, and change a letter's case."""
    if isinstance(given, list) and isinstance(kept, list):
        return sorted(map(str, given)) == sorted(map(str, kept))
    return str(given).lower().strip() == str(kept).lower().strip()


@lru_cache(maxsize=1)
def _known() -> dict[str, Any]:
    """Instruction id to checker class, of both benchmarks."""
    import langdetect
    import nltk

    # IFBench downloads NLTK's data when imported; a grader touches no network.
    with mock.patch.object(nltk, "download", return_value=False):
        from if_verifiable.ifbench import instructions as ifbench
        from if_verifiable.ifbench import instructions_util as ifbench_util
        from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT as IFBENCH
        from if_verifiable.ifeval import instructions_util as ifeval_util
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as IFEVAL

    langdetect.DetectorFactory.seed = 0  # otherwise the detected language is random
    for module in (ifbench, ifbench_util, ifeval_util):
        module.nltk = _nltk_with_packaged_punkt()
    for module in (ifbench_util, ifeval_util):
        module._get_sentence_tokenizer = _sentence_tokenizer
    return {**IFBENCH, **IFEVAL}


def _nltk_with_packaged_punkt() -> SimpleNamespace:
    """The names of NLTK that the checkers use, with sentences split by the packaged model."""
    import nltk

    words = nltk.tokenize.NLTKWordTokenizer()

    def word_tokenize(text: str) -> list[str]:
        sentences = _sentence_tokenizer().tokenize(text)
        return [token for sentence in sentences for token in words.tokenize(sentence)]

    return SimpleNamespace(
        word_tokenize=word_tokenize,
        pos_tag=nltk.pos_tag,
        ngrams=nltk.ngrams,
        tokenize=nltk.tokenize,
        corpus=nltk.corpus,
    )


@lru_cache(maxsize=1)
def _sentence_tokenizer() -> Any:
    import punkt

    return punkt.tokenizer_for("english")


def _has_data(name: str) -> bool:
    import nltk

    try:
        nltk.data.find(name)
    except LookupError:
        return False
    return True


def warm_up() -> None:
    """Import the checkers and load their models, before workers are forked."""
    import langdetect

    _known()
    _sentence_tokenizer().tokenize("One. Two.")
    langdetect.detect("A sentence in some language.")
