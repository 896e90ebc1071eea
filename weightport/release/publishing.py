"""release(): check, describe, upload. Everything is ready before the Hub is asked for anything."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightport.errors import CheckpointError, OutputError, UsageError
from weightport.hub import (
    HUB_ERRORS,
    REQUEST_TIMEOUT,
    endpoint,
    reason,
    refused,
    request_timeouts,
    scrubbed_logs,
    shareable,
)
from weightport.release.card import CardOptions, model_card
from weightport.release.checking import CheckedDirectory, check_directory, require_unchanged
from weightport.release.contents import PublishedFile, contents, require_own_card, require_own_sums, sealed, write_into
from weightport.release.family import PublishedFamily

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class ReleaseOptions:
    """What a release is called and how it is made. `licence` None: passed on from what is known of the family.
    `include`: names of files to publish that are not known to belong to a model."""

    repo: str
    licence: str | None = None
    base_model: str | None = None
    language: tuple[str, ...] = ()
    private: bool = False
    revision: str | None = None
    include: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True)
class Release:
    """A release, uploaded or (`url` None) only prepared: the card, and the files in the order of their names."""

    checked: CheckedDirectory
    card: str
    files: tuple[PublishedFile, ...]
    url: str | None


def release(
    directory: str | Path,
    options: ReleaseOptions,
    family_of: Callable[[object], PublishedFamily | None],
    *,
    api: HfApi | None = None,
    announce: Callable[[CheckedDirectory, Sequence[PublishedFile]], None] = lambda checked, files: None,
) -> Release:
    """Publish the model directory as `options.repo`; with `dry_run` change nothing and use no network.

    `family_of` gives the family of a model_type. `api` is a huggingface_hub.HfApi. Raises UsageError, what
    check_directory raises, and OutputError when the Hub cannot be reached or refuses: the directory, with its card,
    stays ready then.
    """
    if not _REPO.fullmatch(options.repo):
        raise UsageError(f"{options.repo!r} is no repository: expected ORG/NAME.")
    checked = check_directory(directory, family_of, options.include)
    licence = _licence(checked, options)
    card = sealed(_card(checked, CardOptions(options.repo, licence, options.base_model, options.language)))
    require_own_card(checked)
    require_own_sums(checked)
    files = contents(checked, card)
    announce(checked, files)
    if options.dry_run:
        return Release(checked, card, files, None)
    write_into(checked, files)
    return Release(checked, card, files, _upload(checked, files, options, api))


def command(directory: Path, options: ReleaseOptions) -> str:
    """The command line that makes this release, quoted for a shell."""
    words = ["port-release", str(directory), "--repo", options.repo]
    for option, value in (
        ("--licence", options.licence),
        ("--base-model", options.base_model),
        ("--revision", options.revision),
    ):
        words += [option, value] if value is not None else []
    for option, values in (("--language", options.language), ("--include", options.include)):
        words += [word for value in values for word in (option, value)]
    return shlex.join([*words, *(["--private"] if options.private else [])])


def _card(checked: CheckedDirectory, options: CardOptions) -> str:
    try:
        return model_card(checked, options)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{checked.path}: a record ({', '.join(checked.records)}) is not laid out as weightport writes it "
            f"({type(error).__name__}: {error}). Remove the one that was edited, or write it again."
        ) from error


def _licence(checked: CheckedDirectory, options: ReleaseOptions) -> str:
    found = options.licence or (checked.family.licence if checked.family else None)
    if found is None:
        raise UsageError(
            "The licence is not known from the directory: pass --licence, as the Hub names it (apache-2.0, mit, "
            "gemma, other, …). A fine-tuned model keeps the terms of the one it was made from."
        )
    if not _LICENCE.fullmatch(found):
        raise UsageError(f"{found!r} is no licence as the Hub names them: apache-2.0, mit, cc-by-4.0, other, ….")
    return found


def _upload(
    checked: CheckedDirectory, files: Sequence[PublishedFile], options: ReleaseOptions, api: HfApi | None
) -> str:
    """Upload in one commit, so that the repository never holds half of a release; the address of what was made.

    Large files go first, and one that arrived is not sent again by a later run.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    additions = [_addition(file) for file in files]
    repo, revision = options.repo, options.revision
    try:
        with scrubbed_logs(), request_timeouts():
            api.create_repo(repo, private=options.private, exist_ok=True)
            if options.private:
                _require_private(api, repo)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            api.preupload_lfs_files(repo, additions=additions, free_memory=False, revision=revision)
            require_unchanged(checked)
            api.create_commit(repo, additions, commit_message="Publish with weightport", revision=revision)
    except HUB_ERRORS as error:
        todo = (
            "Log in with a token that may write there (hf auth login), then run again:"
            if refused(error)
            else "Files that arrived are not sent again. To go on:"
        )
        raise OutputError(
            f"The Hub did not take {options.repo}: {reason(error)}\n"
            f"  {checked.path} is ready, with its card. {todo}\n"
            f"  {command(checked.path, options)}"
        ) from shareable(error)
    return f"{endpoint()}/{options.repo}" + (f"/tree/{options.revision}" if options.revision else "")


def _addition(file: PublishedFile) -> CommitOperationAdd:
    """The file as huggingface_hub takes it; a known hash spares it a read of the whole file."""
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(file.name, file.content if file.content is not None else str(file.path))
    if file.sha256 is not None:
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    return addition


def _require_private(api: HfApi, repo: str) -> None:
    if api.model_info(repo, timeout=REQUEST_TIMEOUT).private is False:
        raise OutputError(
            f"{repo} exists and is public, and --private does not change that. Make it private on the Hub first, or "
            "choose another --repo. Nothing was uploaded."
        )
