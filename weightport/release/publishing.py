"""release(): check, describe, upload. The directory is ready before the Hub is asked for anything."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightport.converters.portable import write_portable_code
from weightport.errors import OutputError, UsageError
from weightport.release.card import CardOptions, model_card
from weightport.release.checking import CheckedDirectory, check_directory
from weightport.release.family import PublishedFamily
from weightport.writing import own_file

_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class ReleaseOptions:
    """What a release is called and how it is made. `licence` None: passed on from what is known of the family."""

    repo: str
    licence: str | None = None
    base_model: str | None = None
    language: tuple[str, ...] = ()
    private: bool = False
    revision: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Release:
    """A release, uploaded or (`url` None) only prepared: the card, and the files in the order of their names."""

    checked: CheckedDirectory
    card: str
    files: tuple[str, ...]
    url: str | None


def release(
    directory: str | Path,
    options: ReleaseOptions,
    family_of: Callable[[object], PublishedFamily | None],
    *,
    api: Any = None,
    announce: Callable[[CheckedDirectory], None] = lambda checked: None,
) -> Release:
    """Publish the model directory as `options.repo`; with `dry_run` change nothing and use no network.

    `family_of` gives the family of a model_type. `api` is a huggingface_hub.HfApi. Raises UsageError, what
    check_directory raises, and OutputError when the Hub cannot be reached or refuses: the directory, with its card,
    stays ready then.
    """
    if not _REPO.fullmatch(options.repo):
        raise UsageError(f"{options.repo!r} is no repository: expected ORG/NAME.")
    checked = check_directory(directory, family_of)
    licence = _licence(checked, options)
    card = model_card(checked, CardOptions(options.repo, licence, options.base_model, options.language))
    code = _code(checked)
    files = tuple(sorted({*(path.name for path in checked.files), *code, "README.md"}))
    announce(checked)
    if options.dry_run:
        return Release(checked, card, files, None)
    with own_file(checked.path / "README.md") as path:
        path.write_text(card, encoding="utf-8")
    if code:
        _write_code(checked, checked.path)
    return Release(checked, card, files, _upload(checked.path, files, options, api))


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


def _code(checked: CheckedDirectory) -> list[str]:
    """The modeling files that the release gets because transformers has none for the family."""
    if not checked.needs_code:
        return []
    with tempfile.TemporaryDirectory(prefix="weightport-code-") as folder:
        _write_code(checked, Path(folder))
        return sorted(path.name for path in Path(folder).glob("*.py"))


def _write_code(checked: CheckedDirectory, folder: Path) -> None:
    if checked.family is not None and checked.family.portable_code is not None:
        write_portable_code(folder, checked.family.portable_code, checked.family.portable)


def _upload(folder: Path, files: tuple[str, ...], options: ReleaseOptions, api: Any) -> str:
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(options.repo, private=options.private, exist_ok=True)
        if options.revision is not None:
            api.create_branch(options.repo, branch=options.revision, exist_ok=True)
        api.upload_folder(
            repo_id=options.repo,
            folder_path=folder,
            allow_patterns=list(files),
            revision=options.revision,
            commit_message="Publish with weightport",
        )
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        again = f"port-release {folder} --repo {options.repo}"
        again += " --private" if options.private else ""
        again += f" --revision {options.revision}" if options.revision else ""
        raise OutputError(
            f"The Hub did not take {options.repo}: {reason}\n"
            f"  {folder} is ready, with its card. Log in (hf auth login) or wait for the network, then run again:\n"
            f"  {again}"
        ) from error
    return f"https://huggingface.co/{options.repo}" + (f"/tree/{options.revision}" if options.revision else "")
