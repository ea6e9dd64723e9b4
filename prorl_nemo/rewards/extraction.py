"""Where the answer stands in a response. Every function is linear in the text's length.

Only the text after the last `</think>` counts: what a model considers while thinking is
not an answer (DeepScaleR's rule, which ProRL trains with).
"""

from __future__ import annotations

import re
from typing import Any

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*$", re.MULTILINE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|([{}])", re.DOTALL)


def final_part(text: str, grading: dict[str, Any] | None = None) -> str:
    """The part of a response that may hold the answer.

    Args:
        text: the response.
        grading: its record. `"thinking": true` says that the prompt already opened a
            `<think>` block, so that a response without `</think>` never left it.

    Returns:
        What follows the last `</think>`; all of it when nothing was thought; the empty
        string when a thought was opened and not closed.
    """
    _, closed, after = text.rpartition("</think>")
    if closed:
        # A thought opened again and left open is no answer either.
        return after.partition("<think>")[0]
    if (grading or {}).get("thinking") or "<think>" in text:
        return ""
    return text


def last_tag(text: str, tag: str = "answer") -> str | None:
    """Stripped content of the last `<tag>...</tag>` pair, or None without one."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    if start < 0:
        return None
    start += len(opening)
    return text[start : text.index(closing, start)].strip()


def last_box(text: str, max_length: int = 2000) -> str | None:
    r"""Content of the last balanced `\boxed{...}` (or `\fbox{...}`), stripped.

    None without a box, or when the last one is not closed within `max_length` characters:
    an earlier box would be an answer that the model went on to revise.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for brace in _BRACE.finditer(text, start, start + max_length + 1):
        depth += {"{": 1, "}": -1}.get(brace[1], 0)
        if depth == 0:
            return text[start : brace.start()].strip()
    return None


def last_code_block(text: str) -> tuple[str, str] | None:
    """Language tag (lower case, perhaps empty) and content of the last fenced code block.

    A last block that is not closed counts when it is the only one: models often stop
    right after the code. None without any fence.
    """
    fences = list(_FENCE.finditer(text))
    if not fences:
        return None
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    for fence in fences:
        if opened is None:
            opened = fence
        elif not fence.group(1):
            blocks.append((opened.group(1).lower(), text[opened.end() + 1 : fence.start()]))
            opened = None
    if opened is not None and not blocks:
        blocks.append((opened.group(1).lower(), text[opened.end() + 1 :]))
    return blocks[-1] if blocks else None
