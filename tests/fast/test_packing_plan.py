"""Rows and ranks: nothing lost, nothing overfull, few rows, even loads."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prorl_nemo.megatron.packing_plan import (
    CostModel,
    TrainingItem,
    balance,
    items_of_group,
    pack,
    plan_rows,
)

sizes_and_budget = st.tuples(st.lists(st.integers(1, 120), max_size=60), st.integers(1, 100))


def best_fit_decreasing(sizes: list[int], budget: int) -> int:
    """Rows of the rule as it is defined: the fullest row that still has room, else a new one."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(budget - size)
    return len(rooms)


@given(sizes_and_budget)
def test_rows_by_the_definition(case: tuple[list[int], int]) -> None:
    sizes, budget = case
    rows = pack(sizes, budget)
    assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= budget or len(row) == 1 for row in rows)
    assert len(rows) == best_fit_decreasing(sizes, budget)
    assert rows == pack(sizes, budget)


def test_rows_by_hand() -> None:
    # 6 + 4 and 5 + 3 + 2 fill two rows of 10; 12 is longer than a row and has one to itself.
    assert pack([6, 5, 4, 3, 2, 12], 10) == [[5], [0, 2], [1, 3, 4]]
    assert pack([], 10) == []


def fewest_rows(sizes: list[int], budget: int) -> int:
    """By trying every assignment."""
    for rows in range(1, len(sizes) + 1):
        for places in itertools.product(range(rows), repeat=len(sizes)):
            loads = np.bincount(places, weights=sizes, minlength=rows)
            if loads.max() <= budget:
                return rows
    return 0


def test_rows_against_the_optimum() -> None:
    draw = random.Random(0)
    for _ in range(40):
        sizes = [draw.randint(1, 10) for _ in range(6)]
        # Best fit from the longest down needs at most 11/9 of the optimum and 6/9 (Johnson 1973).
        assert len(pack(sizes, 10)) <= 11 / 9 * fewest_rows(sizes, 10) + 6 / 9


@given(st.lists(st.floats(0.1, 1e6), max_size=50), st.integers(1, 8))
def test_every_item_has_one_rank(costs: list[float], ranks: int) -> None:
    shares = balance(costs, ranks)
    assert len(shares) == ranks
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    if len(costs) > ranks:
        loads = [sum(costs[i] for i in share) for share in shares]
        # Graham's bound on longest first (4/3 - 1/(3 ranks)), against what no split can beat.
        floor = max(sum(costs) / ranks, max(costs))
        assert max(loads) <= (4 / 3 * 2) * floor


def test_balance_by_hand() -> None:
    assert balance([5.0, 3.0, 4.0, 2.0], 2) == [[0, 3], [1, 2]]
    # Longest first alone ends at 7 + 5 + 1 | 6 + 4: the exchange of 7 and 6 evens it to 12 | 11.
    loads = [sum([7, 6, 5, 4, 1][i] for i in share) for share in balance([7, 6, 5, 4, 1], 2)]
    assert sorted(loads) == [11, 12]


def test_exchanges_end_where_none_helps() -> None:
    """Longest first deals 11 9 1 and 11 7 6; one swap makes 22 and 23 of them, the best."""
    costs = [11.0, 6.0, 11.0, 9.0, 1.0, 7.0]
    assert sorted(sum(costs[i] for i in share) for share in balance(costs, 2)) == [22.0, 23.0]


def test_balance_is_even_on_response_lengths() -> None:
    draw = random.Random(1)
    costs = [draw.lognormvariate(8, 1) for _ in range(2048)]
    for ranks in (2, 8, 64):
        loads = [sum(costs[i] for i in share) for share in balance(costs, ranks)]
        # A thousandth of a step is far below what timing noise hides.
        assert max(loads) * ranks / sum(loads) - 1 < 1e-3


def items(*lengths: int) -> list[TrainingItem]:
    return [TrainingItem([0], [[1] * (n - 1)], [i]) for i, n in enumerate(lengths)]


def test_plan_by_hand() -> None:
    plan = plan_rows(items(8, 6, 4, 2), 10, 2, CostModel())
    assert [sorted(map(sorted, rows)) for rows in plan] == [[[0, 3]], [[1, 2]]]


@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 60),
)
def test_plan_reaches_every_rank(
    lengths: list[int], ranks: int, rows_per_rank: int, budget: int
) -> None:
    planned = plan_rows(items(*lengths), budget, ranks, CostModel(pair=0.1), rows_per_rank)
    assert len(planned) == ranks
    assert all(len(rows) >= rows_per_rank for rows in planned)
    assert sorted(i for rows in planned for row in rows for i in row) == list(range(len(lengths)))
    for rows in planned:
        held = sum(map(len, rows))
        # Empty rows only where a rank has fewer items than rows to show.
        assert not any(not row for row in rows) or held < rows_per_rank
        assert all(len(row) == 1 or sum(lengths[i] for i in row) <= budget for row in rows)


def test_cost_by_hand() -> None:
    # Prompt 3, responses 2 and 1: 6 tokens, 3 targets; pairs 1+2+3, 4+5 and 4.
    item = TrainingItem([7, 7, 7], [[1, 2], [3]], [0, 1])
    assert CostModel(1.0, 0.0, 0.0).of(item) == 6
    assert CostModel(0.0, 1.0, 0.0).of(item) == 3
    assert CostModel(0.0, 0.0, 1.0).of(item) == 19


def test_pairs_against_a_mask() -> None:
    prompt, responses = 4, (3, 1, 5)
    total = prompt + sum(responses)
    branch = np.repeat(range(len(responses) + 1), (prompt, *responses))
    seen = np.tri(total, dtype=bool) & ((branch == 0) | (branch[:, None] == branch))
    item = TrainingItem([0] * prompt, [[1] * n for n in responses], [0, 1, 2])
    assert CostModel(0.0, 0.0, 1.0).of(item) == seen.sum()


def test_a_group_is_split_where_the_budget_ends() -> None:
    responses = [[1] * n for n in (5, 3, 4, 2)]
    found = items_of_group([9, 9], responses, [10, 11, 12, 13], True, budget=9)
    assert [(item.tokens, sorted(item.sample_ids)) for item in found] == [
        (9, [10, 13]),
        (9, [11, 12]),
    ]
    assert all(list(item.prompt_ids) == [9, 9] for item in found)
    # A response that does not fit beside the prompt still comes with it.
    assert [item.tokens for item in items_of_group([9] * 8, responses, [0, 1, 2, 3], True, 9)] == [
        13,
        12,
        11,
        10,
    ]


@pytest.mark.parametrize("budget", [None, 1000])
def test_a_group_that_fits_is_one_item(budget: int | None) -> None:
    responses = [[1], [2, 2], [3]]
    (item,) = items_of_group([9], responses, [4, 5, 6], True, budget)
    assert list(item.responses) == responses
    assert list(item.sample_ids) == [4, 5, 6]
