"""Which training problems are questions of an evaluation set: overlap of word n-grams.

Our choice of rule. Removing a problem for a single shared n-gram (GPT-3's rule, 13 words) throws
out contest problems that share a phrase such as "the first line contains the number of test
cases". So a problem is removed only when it holds a share of an evaluation question's n-grams:
the question may be changed a little, or stand inside a longer text.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prorl_nemo.data.public_sources import text_of
from prorl_nemo.data.record import BadRowError, SkippedRow, words
from prorl_nemo.data.row_files import Row, data_files, rows
from prorl_nemo.errors import RecipeError

# Fields in which evaluation sets keep their question.
_FIELDS = ("problem", "question", "prompt", "Problem", "Question", "text", "input")


@dataclass(frozen=True)
class Match:
    """An evaluation question found in a training problem.

    Attributes:
        question: `<file>:<row>`.
        share: of the question's n-grams that the problem holds.
    """

    question: str
    share: float


class EvaluationSets:
    """The questions of evaluation sets, ready to be looked for.

    Args:
        paths: data files or folders of them.
        ngram: words of a run. A shorter question is found only as a whole problem.
        overlap: the share of a question's runs at which a problem counts as that question.

    Raises:
        RecipeError: a path without questions.
    """

    def __init__(self, paths: Sequence[str], ngram: int, overlap: float) -> None:
        self._ngram, self._overlap = ngram, overlap
        self.names: list[str] = []
        self.counts: Counter[str] = Counter()
        self._runs: list[int] = []  # Of each question, how many different ones.
        self._holders: dict[int, list[int]] = defaultdict(list)
        self._whole: dict[str, int] = {}
        for number, path in enumerate(paths):
            for name, text in _questions(
                Path(path).expanduser(), f"data.build.evaluation.{number}"
            ):
                self._add(name, text)

    def __len__(self) -> int:
        return len(self.names)

    def match(self, problem: str) -> Match | None:
        """The evaluation question that a problem holds most of, if that is too much."""
        found = words(problem)
        whole = self._whole.get(" ".join(found))
        if whole is not None:
            return Match(self.names[whole], 1.0)
        shared: Counter[int] = Counter()
        for run in self._ngrams(found):
            shared.update(self._holders.get(run, ()))
        shares = [(count / self._runs[question], -question) for question, count in shared.items()]
        share, question = max(shares, default=(0.0, 0))
        return Match(self.names[-question], share) if share >= self._overlap else None

    def _add(self, name: str, text: str) -> None:
        number, found = len(self.names), words(text)
        if not found:
            return
        self.names.append(name)
        self.counts[name.rpartition(":")[0]] += 1
        self._whole.setdefault(" ".join(found), number)
        runs = self._ngrams(found)
        self._runs.append(len(runs))
        for run in runs:
            self._holders[run].append(number)

    def _ngrams(self, found: list[str]) -> set[int]:
        n = self._ngram
        # Hashes, because the texts of half a million runs would take gigabytes.
        return {hash(" ".join(found[i : i + n])) for i in range(len(found) - n + 1)}


def _questions(path: Path, key: str) -> Iterator[tuple[str, str]]:
    """(`<file>:<row>`, question) of every row at a path."""
    found = 0
    for file in data_files(path):
        for number, row in rows(file):
            text = _question(row)
            if text is None:
                what = f"no question in {', '.join(_FIELDS)}"
                reason = row if isinstance(row, BadRowError) else what
                raise RecipeError(f"{key}: {file}, row {number}: {reason}; nothing may be missed")
            found += 1
            yield f"{file.name}:{number}", text
    if not found:
        raise RecipeError(f"{key}: {path} holds no questions")


def _question(row: Row | BadRowError) -> str | None:
    if isinstance(row, BadRowError):
        return None
    for name in _FIELDS:
        if row.get(name) is not None:
            try:
                return text_of(row[name])
            except SkippedRow:
                return " ".join(str(turn.get("content")) for turn in row[name])
            except BadRowError:
                continue
    return None
