"""Speaking to the Hub: knowing at once when it cannot be reached, and what went wrong in one line without secrets."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token, hf_hub_download, set_client_factory, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import _http, get_session

PROBE_SECONDS = 5.0
REQUEST_TIMEOUT = 120.0
"""Seconds that the Hub may be silent during an upload: a commit of many files takes it a while."""

# The base of all errors of the HTTP client that huggingface_hub uses, httpx or httpx2: a broken connection is no
# OSError there.
_TRANSPORT: type[Exception] = HfHubHTTPError.__mro__[1]

HUB_ERRORS: tuple[type[Exception], ...] = (_TRANSPORT, OSError, EntryNotFoundError, RuntimeError, ValueError)
"""What calls into huggingface_hub raise: the network, refusals, replies that are none, threads that failed."""

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}\b")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def endpoint() -> str:
    """The Hub's address (HF_ENDPOINT), without a name and password that may stand in it."""
    return without_secrets(constants.ENDPOINT)


def why_unreachable() -> str | None:
    """Why the Hub cannot be reached, asked once; None when it answers, with whatever status."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except HUB_ERRORS as error:
        return reason(error)
    return None


@contextmanager
def at_once() -> Iterator[None]:
    """Lets the calls in the block use the cache alone where the Hub cannot be reached: huggingface_hub tries for 23
    seconds otherwise. Raises ConnectionError then for what the cache does not hold."""
    why = why_unreachable()
    if why is None:
        yield
        return
    with _offline():
        try:
            yield
        except HUB_ERRORS as error:
            raise ConnectionError(f"no answer from {endpoint()} ({why})") from error


def download(repository: str, name: str) -> Path:
    """One file of a repository, in the Hub's cache. Raises HUB_ERRORS, at once where the Hub cannot be reached."""
    with at_once():
        return Path(hf_hub_download(repository, name))


def download_folder(repository: str, names: Sequence[str]) -> Path:
    """The files of a repository that match `names`, as a folder in the Hub's cache. Raises HUB_ERRORS, at once where
    the Hub cannot be reached."""
    with at_once():
        return Path(snapshot_download(repository, allow_patterns=list(names)))


def reason(error: BaseException) -> str:
    """What went wrong, in one line and without secrets; of an error in a thread, the cause as well."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        text = f"{text.rstrip('.')}: {reason(error.__cause__)}"
    return without_secrets(text)


def without_secrets(text: str) -> str:
    """`text` without the user's token, anything that looks like one, and passwords in addresses."""
    try:
        token = get_token()
    except OSError:
        # A home folder that may not be looked into holds no token that could be shown.
        token = None
    text = text.replace(token, "<token>") if token else text
    return _CREDENTIALS.sub("", _TOKEN.sub("<token>", text))


def refused(error: BaseException) -> bool:
    """Whether the Hub answered that this user may not do it."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None) in (401, 403)


def shareable(error: Exception) -> Exception | None:
    """The error as the cause of another, or None when its text or that of a cause of it holds a secret: a traceback
    would print it."""
    each: BaseException | None = error
    while each is not None:
        if without_secrets(str(each)) != str(each):
            return None
        each = each.__cause__ or each.__context__
    return error


@contextmanager
def request_timeouts() -> Iterator[None]:
    """Requests of the block end with an error where the other side is silent for REQUEST_TIMEOUT seconds:
    huggingface_hub has no time limit, unless a client factory of the user's sets one, which is kept."""
    # There is a function that sets the factory, and none that tells it.
    before = _http._GLOBAL_CLIENT_FACTORY

    def client() -> Any:
        made = before()
        if made.timeout.read is None:
            made.timeout = REQUEST_TIMEOUT
        return made

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(before)


@contextmanager
def bars(*, shown: bool) -> Iterator[None]:
    """huggingface_hub's progress bars, shown or not while the block runs."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


class _Scrub(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), None
        return True


@contextmanager
def scrubbed_logs() -> Iterator[None]:
    """Keeps secrets out of what huggingface_hub logs (addresses of failed requests) while the block runs."""
    scrub, handlers = _Scrub(), logging.getLogger("huggingface_hub").handlers
    for handler in handlers:
        handler.addFilter(scrub)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(scrub)


@contextmanager
def _offline() -> Iterator[None]:
    modules: list[Any] = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before):
            module.HF_HUB_OFFLINE = value
