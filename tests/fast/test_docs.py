"""The documentation names what the code writes, and its links lead somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "recipes" / "README.md",
]
METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
GROUPS = ("reward", "rollout", "shaping", "policy", "mismatch", "time", "throughput", "validation")


def strings(path: Path) -> Iterator[str]:
    """String constants of a file; of an f-string its literal parts, with <> for the rest."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "<>" for part in node.values
            )


def documented() -> set[str]:
    """Keys in backquotes, names in <> made equal."""
    return {re.sub(r"<.*?>", "<>", key) for key in re.findall(r"`([^`\s]+)`", METRICS)}


def test_every_key_that_is_written_is_documented() -> None:
    written = set()
    for name in ("step_metrics.py", "loop.py", "validation.py"):
        for text in strings(ROOT / "prorl_nemo" / "training" / name):
            if re.fullmatch(rf"({'|'.join(GROUPS)})/[a-z0-9_/<>]+", text):
                written.add(text)
    # Prefixes, and names made of a prefix and a list in step_metrics.py.
    written = {key for key in written if not key.endswith("/")} - {"time/<>", "mismatch/<>"}
    assert len(written) > 30
    assert written <= documented(), sorted(written - documented())


def test_every_documented_key_is_written() -> None:
    sources = " ".join(
        text
        for name in ("training/step_metrics.py", "training/loop.py", "training/validation.py")
        for text in strings(ROOT / "prorl_nemo" / name)
    )
    sources += " ".join(strings(ROOT / "prorl_nemo" / "algorithms" / "mismatch.py"))
    keys = {key for key in documented() if key.split("/")[0] in GROUPS and "/" in key}
    for key in keys:
        group, name = key.split("/", 1)
        known = key in sources or (group in ("time", "mismatch") and name in sources)
        assert known, f"docs/metrics.md: nothing writes {key}"


def test_every_event_is_documented() -> None:
    found = set()
    for path in (ROOT / "prorl_nemo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            first = node.args[0]
            if name.lstrip("_") in ("event", "on_event") and isinstance(first, ast.Constant):
                found.add(first.value)
    assert len(found) > 8
    section = METRICS[METRICS.index("## events.jsonl") : METRICS.index("## samples/")]
    assert found == set(re.findall(r"^\| `(\w+)` \|", section, re.M))


@pytest.mark.parametrize(("name", "least"), [("troubleshooting.md", 60), ("cluster.md", 15)])
def test_quoted_messages_are_ours(name: str, least: int) -> None:
    """What a page quotes in a column of messages is in the code; … is any text."""
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    said = " ".join(text for path in (ROOT / "prorl_nemo").rglob("*.py") for text in strings(path))
    said += (ROOT / "slurm" / "job.sh").read_text(encoding="utf-8")
    foreign = {"operator torchvision::nms does not exist", "kill -9", "checkpoint_damaged"}
    quoted = set()
    for table in re.findall(r"^\| message.*?\|.*\n\|(?:---\|)+\n((?:\|.*\n)+)", page, re.M):
        for row in table.splitlines():
            quoted.update(re.findall(r"`([^`]+)`", row.split(" | ")[0]))
    assert len(quoted) >= least
    for message in sorted(quoted - foreign):
        for piece in message.split("…"):
            assert piece.strip() in said, f"docs/{name}: {message}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if "://" not in link:
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}#{anchor}"
    # Paths of the repository in backquotes, from its root, the package or the page's folder.
    rooms = "|".join(
        p.name for p in [*ROOT.iterdir(), *(ROOT / "prorl_nemo").iterdir()] if p.is_dir()
    )
    for path in re.findall(rf"`((?:{rooms})/[\w./-]*(?:\.\w+|/))`", text):
        if path.startswith("runs/"):
            continue
        bases = (ROOT, ROOT / "prorl_nemo", page.parent)
        assert any((base / path).exists() for base in bases), f"{page.name}: {path}"
