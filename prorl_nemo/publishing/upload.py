"""`prorl publish`: an exported folder to the hub, by the hub's own client.

Private unless said otherwise. The token is the client's: HF_TOKEN, or what `hf auth login` keeps;
it is never read here. The client resumes: files that are there already are not sent again.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prorl_nemo.errors import UserError
from prorl_nemo.model_source import check_model_folder
from prorl_nemo.publishing.folder import about

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
# Never part of a model, whoever put it there.
_IGNORED = (".*", "*.part", "*.lock", "lock", "*.env")


@dataclass(frozen=True)
class File:
    """A file that is uploaded; `size` in bytes."""

    path: str
    size: int
    sha256: str


def files_of(folder: Path) -> list[File]:
    """Every file that would be uploaded, by name.

    Raises:
        UserError: a link (it might lead anywhere), or a model that is not whole.
    """
    check_model_folder(folder)
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink():
            raise UserError(f"{path}: a link; publish real files only")
        if path.is_file() and not any(Path(part).match(p) for part in name.parts for p in _IGNORED):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found.append(File(name.as_posix(), path.stat().st_size, digest))
    return found


def tag_of(folder: Path) -> str:
    """The revision of an export: `step-002000`."""
    return f"step-{int(about(folder)['step']):06d}"


def check_names(repository: str, tag: str) -> None:
    """Refuse names that the hub would refuse, after the upload. Raises UserError."""
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"--repo: {repository!r} is no name on the hub; write it as ORG/NAME")
    if not _TAG.fullmatch(tag) or ".." in tag:
        raise UserError(f"--tag: {tag!r} is no name of a revision; letters, digits, dash and dot")


def publish(folder: Path, repository: str, tag: str, private: bool = True) -> str:
    """Create the repository if need be, upload the folder, tag the revision. Returns its address.

    Raises:
        UserError: no token, no right, no network, or a tag that marks other files.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    check_names(repository, tag)
    files = files_of(folder)
    api = HfApi(library_name="prorl-nemo")
    if get_token() is None:
        raise UserError("publish: no token; set HF_TOKEN, or log in with `hf auth login`")
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        there = api.repo_info(repository)
        if bool(there.private) != private:
            raise UserError(
                f"--repo: {repository} is {'private' if there.private else 'public'} already; "
                + ("leave --public out" if there.private else "add --public, if it shall stay so")
            )
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[file.path for file in files],
            ignore_patterns=list(_IGNORED),
            commit_message=f"{about(folder)['run']}, step {about(folder)['step']}",
        )
        _tag(api, repository, tag, commit.oid)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise UserError(f"publish: the hub refuses ({_why(status, error)})") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"publish: {str(error).strip().partition(chr(10))[0][:300]}; the same command goes on "
            "where this one stopped"
        ) from None
    return f"{made}/tree/{tag}"


def _tag(api: HfApi, repository: str, tag: str, commit: str) -> None:
    """Mark a commit. A tag that marks it already is left; one that marks another is refused."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_tag(repository, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:
            raise
        marked = {ref.name: ref.target_commit for ref in api.list_repo_refs(repository).tags}
        if marked.get(tag) != commit:
            raise UserError(
                f"--tag: {tag} marks other files of {repository} already; the upload is in its "
                "main branch: give another name with --tag"
            ) from None


def _why(status: int | None, error: Exception) -> str:
    """What a status means here, in a line that cannot hold a token."""
    meanings = {
        401: "the token is not valid",
        403: "the token may not write there",
        404: "there is no such place, or the token may not see it",
    }
    if status in meanings:
        return meanings[status]
    first = str(error).strip().partition("\n")[0][:200]
    return f"status {status}: {first}"
