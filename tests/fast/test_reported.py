"""Published numbers: the tables are whole and consistent, and comparisons know their noise."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.benchmark import load_benchmarks
from prorl_nemo.evaluation.estimators import average
from prorl_nemo.evaluation.reported import Reported, compare, load_reported

ROOT = Path(__file__).parents[2]
HEADER = "model,benchmark,value,metric,protocol,source,doubt\n"
MEMBERS = {
    "math_average": ["aime24", "aime25", "amc", "math500", "minerva", "olympiadbench"],
    "code_average": [
        "apps",
        "codecontests",
        "codeforces",
        "taco",
        "humanevalplus",
        "livecodebench",
    ],
    "code_average_4": ["apps", "codecontests", "codeforces", "taco"],
    "justrl_average": [
        "aime24",
        "aime25",
        "amc23",
        "math500",
        "minerva",
        "olympiadbench",
        "hmmt25",
        "brumo25",
        "cmimc25",
    ],
}


@pytest.fixture(scope="module")
def reported() -> list[Reported]:
    return load_reported(ROOT / "eval" / "reported", set(load_benchmarks(ROOT / "eval")))


def test_printed_averages_are_those_of_their_members(reported: list[Reported]) -> None:
    """A digit that was copied wrongly moves an average."""
    tables: dict[tuple[str, str, str], dict[str, Reported]] = defaultdict(dict)
    for row in reported:
        tables[row.model, row.protocol, row.source][row.benchmark] = row
    checked = 0
    for table in tables.values():
        for name, members in MEMBERS.items():
            if name in table and all(member in table for member in members):
                mean = math.fsum(table[m].value for m in members) / len(members)
                # Members and average are each rounded to two decimals.
                assert table[name].value == pytest.approx(mean, abs=0.0101), table[name].where
                checked += 1
    # ProRL's and the card's five rows of each kind, BroRL's six of each, JustRL's two.
    assert checked == 5 + 5 + 6 + 6 + 2


def test_the_card_s_logic_average_is_that_of_the_categories(reported: list[Reported]) -> None:
    categories = [
        row.value
        for row in reported
        if row.model.endswith("1.5B-v2") and row.benchmark.startswith("reasoning_gym/")
    ]
    card = [row.value for row in reported if row.benchmark == "reasoning_gym_categories"]
    assert len(categories) == 11
    assert card == [pytest.approx(math.fsum(categories) / 11, abs=0.0101)]


def test_the_target_row(reported: list[Reported]) -> None:
    card = {row.benchmark: row.value for row in reported if row.where.partition("prorl_v2.csv")[1]}
    assert len(card) == 17
    assert (card["aime24"], card["livecodebench"], card["ifeval"]) == (49.58, 27.69, 70.85)
    assert {"prorl_v1.csv", "base.csv", "peers.csv", "successors.csv", "later.csv"} < {
        row.where.rpartition("/")[2].partition(":")[0] for row in reported
    }


GOOD = "m,aime24,49.58,avg@16,prorl,paper,\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,value\n", "first line"),
        ("", "first line"),
        (HEADER + "m,aime99,1,avg@16,prorl,paper,\n", "unknown benchmark 'aime99'"),
        (HEADER + GOOD + GOOD, "t.csv:3: repeats .*t.csv:2"),
        (HEADER + "m,aime24,149.58,avg@16,prorl,paper,\n", "no percentage"),
        (HEADER + "m,aime24,nan,avg@16,prorl,paper,\n", "no percentage"),
        (HEADER + "m,aime24,1e1,avg@16,prorl,paper,\n", "no percentage"),
        (HEADER + "m,aime24,-1,avg@16,prorl,paper,\n", "no percentage"),
        (HEADER + "m,aime24,1,mean,prorl,paper,\n", "unknown metric"),
        (HEADER + "m,aime24,1,avg@0,prorl,paper,\n", "unknown metric"),
        (HEADER + "m,aime24,1,avg@16,,paper,\n", "protocol is empty"),
        (HEADER + "m, aime24,1,avg@16,prorl,paper,\n", "padded"),
        (HEADER + "m,aime24,1,avg@16,prorl\n", "5 columns"),
        (HEADER + 'm,aime24,1,avg@16,prorl,paper,"\n', "cannot be read"),
        (HEADER + "\n", "0 columns"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_reported(tmp_path, {"aime24"})


def test_names_that_only_others_report(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(HEADER + GOOD.replace("aime24", "hmmt"), encoding="utf-8")
    (tmp_path / "not_run.yaml").write_text("hmmt: HMMT\n", encoding="utf-8")
    assert load_reported(tmp_path, set())[0].benchmark == "hmmt"
    with pytest.raises(UserError, match="has a definition"):
        load_reported(tmp_path, {"hmmt"})
    with pytest.raises(UserError, match="holds no tables"):
        load_reported(tmp_path / "none", set())


def number(value: str, metric: str = "avg@16", protocol: str = "prorl") -> Reported:
    rounding = 0.5 * 10.0 ** -len(value.partition(".")[2])
    return Reported("m", "aime24", float(value), metric, protocol, "s", "", rounding, "w")


def test_comparison_by_hand() -> None:
    # Two items, four samples each, half right: within-item variance 1/3, error sqrt(1/3/4/2).
    ours = average([[1, 1, 0, 0], [1, 0, 1, 0]])
    error = math.sqrt(1 / 24)
    found = compare(ours, number("40.00", "avg@4"), protocol="prorl", metric="avg")
    assert found.difference == 10
    assert found.noise == pytest.approx(100 * 1.96 * error * math.sqrt(2))
    assert found.inside_noise is True and found.mismatches == ()
    # The other side's noise shrinks with its samples.
    more = compare(ours, number("40.00", "avg@16"), protocol="prorl", metric="avg")
    assert more.noise == pytest.approx(100 * 1.96 * error * math.sqrt(1.25))


def test_comparison_says_what_is_not_the_same() -> None:
    ours = average([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    other = compare(ours, number("10", "reward@16", "rlve"), protocol="prorl", metric="avg")
    assert other.noise is None and other.inside_noise is None
    assert other.mismatches == ("metric reward@16, ours avg@2", "protocol rlve, ours prorl")
    part = compare(ours, number("50"), protocol="prorl", metric="avg", whole=False)
    assert part.mismatches == ("3 items only",)
    assert ours.error_items is not None and part.noise is not None
    assert part.noise > 100 * 1.96 * ours.error_items
    assert compare(ours, number("50", "pass@1"), protocol="prorl", metric="avg").mismatches == ()
    lone = compare(average([[1.0]]), number("50"), protocol="prorl", metric="avg")
    assert lone.noise is None and lone.inside_noise is None


def test_rounding_of_the_printed_number_is_allowed_for() -> None:
    # Samples of an item are alike, and so many that the rule of three leaves 0.0375 points open.
    sure = average([[1.0] * 4, [0.0] * 4] * 1000)
    assert compare(sure, number("50.4"), protocol="prorl", metric="avg").inside_noise is False
    assert compare(sure, number("50"), protocol="prorl", metric="avg").inside_noise is True


def test_the_noise_covers_reruns_of_one_model() -> None:
    """Two evaluations of one model, 8 and 16 samples: outside the noise 5 % of the time."""
    rng = np.random.default_rng(3)
    chances = rng.beta(0.6, 0.8, size=60)[:, None]
    outside = 0
    for _ in range(600):
        ours = average((rng.random((60, 8)) < chances).astype(float).tolist())
        theirs = (rng.random((60, 16)) < chances).mean()
        published = number(f"{100 * theirs:.4f}")
        outside += not compare(ours, published, protocol="prorl", metric="avg").inside_noise
    # 30 expected of 600, standard deviation 5.3; four of those.
    assert 9 <= outside <= 51


def test_scores_that_are_all_alike_leave_three_in_n_open() -> None:
    """0 of 60 samples: a model that is right once in 40 shows that in one of five evaluations."""
    published = Reported("m", "aime24", 2.5, "avg@2", "prorl", "s", "", 0.05, "w")
    ours = average([[0.0, 0.0]] * 30)
    found = compare(ours, published, protocol="prorl", metric="avg")
    assert found.noise == pytest.approx(100 * 3 / 60)
    assert found.inside_noise
    part = compare(ours, published, protocol="prorl", metric="avg", whole=False)
    assert part.noise == pytest.approx(100 * 3 / 30)
