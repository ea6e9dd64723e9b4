"""What MkDocs must know that GitHub does not need: hooks of mkdocs.yml.

Pages are written for both. The study's results are pages of the site too; other links that leave
docs/ lead nowhere there and become their text. The page of functions gets, for each module of its
table, what its docstrings say; of a module whose row names functions, only of these.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_RESULTS = Path("study/results")
_OUTWARD = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
_MODULE = re.compile(r"^\| `(prorl_nemo[\w.]*)` \|(.*)$", re.MULTILINE)


def on_files(files: Any, *, config: Any) -> Any:
    """MkDocs calls this once it has listed docs/."""
    root = Path(config.config_file_path).parent
    for path in (root / _RESULTS / "README.md", *sorted((root / _RESULTS).glob("*.svg"))):
        uri = path.relative_to(root).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """MkDocs calls this for each page before it renders it."""
    markdown = markdown.replace(f"](../{_RESULTS}/", f"]({_RESULTS}/")
    markdown = _OUTWARD.sub(r"\1", markdown)
    if page.file.src_uri == "api.md":
        for module, what_for in _MODULE.findall(markdown):
            markdown += f"\n\n## `{module}`\n\n::: {module}"
            if names := re.findall(r"`(\w+)`", what_for):
                markdown += f"\n    options: {{members: [{', '.join(names)}]}}"
    return markdown
