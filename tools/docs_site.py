"""What MkDocs must know that GitHub does not need: hooks of mkdocs.yml.

Pages are written for both. Links that leave docs/ lead nowhere on the site and become their text;
the page of functions gets, for each module of its table, what its docstrings say.
"""

from __future__ import annotations

import re
from typing import Any

_OUTWARD = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
_MODULE = re.compile(r"^\| `(prorl_nemo[\w.]*)` \|", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """MkDocs calls this for each page before it renders it."""
    markdown = _OUTWARD.sub(r"\1", markdown)
    if page.file.src_uri == "api.md":
        modules = _MODULE.findall(markdown)
        markdown += "".join(f"\n\n## `{module}`\n\n::: {module}" for module in modules)
    return markdown
