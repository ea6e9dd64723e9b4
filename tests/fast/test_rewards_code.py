"""Code: the share of tests passed, compared where the submission cannot reach."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prorl_nemo.rewards.code_outputs import same_output, same_value
from prorl_nemo.rewards.code_tests import read_tests
from prorl_nemo.rewards.registry import grade
from prorl_nemo.rewards.sandbox import SandboxError, runner
from prorl_nemo.rewards.sandbox.probe import working_backend
from prorl_nemo.rewards.verdict import GradingError, Verdict

SQUARES = {"kind": "code", "tests": [{"input": f"{i}\n", "output": f"{i * i}\n"} for i in range(4)]}
ADD = {
    "kind": "code",
    "entry_point": "add",
    "tests": [{"input": [1, 2], "output": 3}, {"input": ["a", "b"], "output": "ab"}],
}
CHECK = {
    "kind": "code",
    "entry_point": "square",
    "setup": 'def helper(x):\n    return x * x\n\ndef square(x):\n    """stub"""\n',
    "checks": ["for i in range(5):\n    assert square(i) == helper(i)\n"],
}
# Compares as equal to, greater and smaller than everything, and subtracts to zero.
CHAMELEON = """
class Chameleon(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __sub__(self, other): return 0
    __rsub__ = __sub__
    def __hash__(self): return 0
    def __int__(self): return 3
"""


def submit(
    record: dict[str, Any], source: str, training: bool = True, fence: str = "python"
) -> Verdict:
    return grade(record, f"So:\n```{fence}\n{source}\n```\n", training=training)


def test_share_in_training_all_or_nothing_in_evaluation() -> None:
    half = "n = int(input())\nprint(n * n if n < 2 else 0)"
    verdict = submit(SQUARES, half)
    assert (verdict.score, verdict.parts["passed"], verdict.parts["tests"]) == (0.5, 2, 4)
    assert verdict.reason == "wrong output (test 3 of 4)"
    assert submit(SQUARES, half, training=False).score == 0.0
    right = "print(int(input())**2)"
    assert submit(SQUARES, right).score == submit(SQUARES, right, training=False).score == 1.0


def test_tests_after_a_failure_are_run() -> None:
    assert submit(SQUARES, "n = int(input())\nprint(n * n if n else 1 / 0)").score == 0.75


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("print(", "compile error"),
        ("import sys; sys.exit(3)", "run-time error: exit code 3"),
        ("1 / 0", "run-time error: ZeroDivisionError at line 1"),
        ("import os; os._exit(0)", "wrong output"),
        ("while True: pass", "timed out: 0.3 s for all tests"),
        ("import nonsense", "run-time error: ModuleNotFoundError"),
        ("x = bytearray(1 << 33)", "run-time error: MemoryError"),
    ],
)
def test_failures_have_reasons(source: str, reason: str) -> None:
    verdict = submit({**SQUARES, "time_limit_s": 0.3}, source)
    assert verdict.score == 0.0
    assert verdict.reason.startswith(reason)


def test_the_time_limit_is_for_all_tests_together() -> None:
    """Each test takes 0.2 s of 0.5 s; four of them take too long."""
    slow = "import time\nwhile time.process_time() < 0.2: pass\nprint(int(input())**2)"
    assert submit({**SQUARES, "time_limit_s": 0.5}, slow).reason.startswith("timed out")
    assert submit({**SQUARES, "time_limit_s": 10}, slow).score == 1.0


@pytest.mark.parametrize(
    "source",
    [
        "def add(a, b):\n    return a + b",
        "class Solution:\n    def add(self, a: List[int], b: int) -> int:\n        return a + b",
        "print('noise')\ndef add(a, b):\n    print('noise')\n    return a + b",
    ],
)
def test_functions(source: str) -> None:
    assert submit(ADD, source).score == 1.0


@pytest.mark.parametrize(
    "body",
    [
        "return Chameleon(7)",
        "return [Chameleon(7)]",
        "import os; os._exit(0)",
        "raise SystemExit",
        "return type(a)",
        "return lambda: 3",
        "return None",
        "import sys; sys.stdout.write('3'); return 0",
        "return float('nan')",
    ],
)
def test_no_object_passes_for_the_result(body: str) -> None:
    assert submit(ADD, f"{CHAMELEON}\ndef add(a, b):\n    {body}").score == 0.0


def test_checks_run_apart_from_the_submission() -> None:
    assert submit(CHECK, "def square(x):\n    return x * x").score == 1.0
    wrong = submit(CHECK, "def square(x):\n    return x + x")
    assert (wrong.score, wrong.reason.split(" at")[0]) == (0.0, "failed: AssertionError")
    cheat = f"{CHAMELEON}\ndef helper(x): return Chameleon()\ndef square(x): return Chameleon(5)"
    assert submit(CHECK, cheat).score == 0.0
    assert submit(CHECK, "import os\nos._exit(0)").score == 0.0


def test_checks_pass_values_and_exceptions_through() -> None:
    record = {
        "kind": "code",
        "entry_point": "f",
        "checks": [
            "assert f((1, 2), k={3, 4}) == {(1, 2): {3, 4}}",
            "try:\n    f(None)\nexcept ValueError as error:\n    assert 'no' in str(error)\n"
            "else:\n    assert False",
            "assert f(b'x', k=1j) == {b'x': 1j}",
        ],
    }
    source = "def f(a, k=0):\n    if a is None:\n        raise ValueError('no')\n    return {a: k}"
    assert submit(record, source).score == 1.0


def test_cpp() -> None:
    source = "#include <iostream>\nint main(){long n;std::cin>>n;std::cout<<n*n;}"
    assert submit(SQUARES, source, fence="cpp").score == 1.0
    verdict = submit(SQUARES, "int main(){", fence="c++")
    assert verdict.reason.startswith("compile error")


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("print(1)", "no answer: no code block"),
        ("```python\n\n```", "no answer: the code block is empty"),
        ("```rust\nfn main(){}\n```", "no answer: a code block in 'rust'"),
        ("<think>```python\nprint(1)\n```", "no answer: no code block"),
        ("```python\n" + "#" * 300_000 + "\n```", "refused"),
        ("```python\n\x00\n```", "compile error"),
        ("```python\nx = '\ud800'\n```", "wrong output"),
        ("```python\n" + "(" * 50_000 + "\n```", "compile error"),
        ("```python\n" + "-" * 100_000 + "1\n```", "compile error"),
    ],
)
def test_odd_responses(response: str, reason: str) -> None:
    verdict = grade(SQUARES, response)
    assert verdict.score == 0.0
    assert verdict.reason.startswith(reason)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"tests": []},
        {"tests": [{"input": "1"}]},
        {"tests": [{"input": 1, "output": "1"}]},
        {"tests": [{"input": "1", "output": 1}]},
        {"entry_point": "f", "tests": [{"input": "1", "output": 1}]},
        {"entry_point": "not a name", "tests": [{"input": [1], "output": 1}]},
        {"checks": ["assert 1"]},
        {"entry_point": "f", "checks": [1]},
        {"entry_point": "f", "checks": ["assert 1"], "setup": "def ("},
        {"tests": [{"input": "", "output": ""}], "language": "rust"},
        {"tests": [{"input": "", "output": ""}], "time_limit_s": -1},
        {"tests": [{"input": "", "output": ""}], "memory_limit_mib": "much"},
    ],
)
def test_malformed_records(record: dict[str, Any]) -> None:
    with pytest.raises(GradingError, match="grading"):
        read_tests(record)


def test_broken_test_code_is_the_data_s_fault() -> None:
    with pytest.raises(GradingError, match="checks"):
        submit({"kind": "code", "entry_point": "f", "checks": ["assert ("]}, "def f(): pass")


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        (b"1 2\n3", "1 2 \n3\n\n", True),
        (b"1\n2", "1 2", True),
        (b"0.3333333", "0.33333333333", True),
        (b"0.333", "0.33333333333", False),
        (b"1e-9", "0.0", True),
        (b"3.0", "3", False),
        (b"3", "3.0", True),
        (b"1", "2", False),
        (b"1 2", "1", False),
        (b"", "1", False),
        (b"", "", True),
        (b"nan", "0.5", False),
        (b"inf", "1e400", False),
        (b"\xff", "\xff", False),
        (b"1\x00", "1", False),
        (b"YES", "yes", False),
    ],
)
def test_same_output(given: bytes, expected: str, same: bool) -> None:
    assert same_output(given, expected) is same


@pytest.mark.parametrize(
    ("returned", "expected", "same"),
    [
        (1, 1, True), (1, 2, False), (1, 1.0, True), (0.1 + 0.2, 0.3, True), (1, True, False),
        ((1, 2), [1, 2], True), ([1, [2]], [1, [2]], True), ([1], [1, 2], False), ("1", 1, False),
        ({1: "a"}, {"1": "a"}, True), ({"a": 1}, {"a": 2}, False), (None, None, True),
        ({1, 2}, [2, 1], True), (float("nan"), float("nan"), False), (10**400, 1.5, False),
        (2**63 + 1, 2**63, False),
    ],
)  # fmt: skip
def test_same_value(returned: Any, expected: Any, same: bool) -> None:
    assert same_value(returned, expected) is same


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=3)
    | st.sets(st.integers(), max_size=3) | st.frozensets(st.text(), max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(PLAIN)
def test_plain_values_travel_unchanged(value: Any) -> None:
    import json

    back = runner.decode(json.loads(json.dumps(runner.encode(value))))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("value", [{"list": [1]}, {"dict": 1}, {"a": 1, "b": 2}, {}])
def test_what_encode_cannot_have_made_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        runner.decode(value)


def test_the_sandbox_is_probed_and_named() -> None:
    assert working_backend().name in ("bubblewrap", "landlock")
    with pytest.raises(SandboxError, match="unknown"):
        working_backend("docker")
