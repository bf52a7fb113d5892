"""Errors of the Hub: retried where they are likely to be temporary, otherwise reported in one sentence."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

ATTEMPTS = 4
LONGEST_WAIT = 120  # seconds; a longer wait is reported instead
_PASSING = (408, 429, 500, 502, 503, 504)


def patiently(call: Callable[[], Result], attempts: int = ATTEMPTS) -> Result:
    """Return what a call to the Hub returns; retry where the error is likely to be temporary.

    It waits as long as the Hub says (Retry-After), or else 1, 2 and 4 seconds.

    Args:
        call: makes requests; doing it twice must do no harm.
        attempts: how often to try; 1 for what huggingface_hub itself tries again.
    """
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            wait = waiting_time(error)
            if attempt == attempts - 1 or not is_passing(error) or (wait or 0) > LONGEST_WAIT:
                raise
            time.sleep(2**attempt if wait is None else wait)
    raise AssertionError


def is_passing(error: BaseException) -> bool:
    """Return whether an error is likely to be temporary: too many requests, a server error, a broken connection."""
    status = status_of(error)
    return status in _PASSING if status is not None else is_broken_connection(error)


def waiting_time(error: BaseException) -> int | None:
    """Return the seconds that the Hub asks to wait, or None if it does not say."""
    response = _response(error)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return int(value) if value.isdecimal() else None


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error stands for, or None."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def is_broken_connection(error: BaseException) -> bool:
    """Return whether an error is a network error: no connection, or an interrupted one."""
    from huggingface_hub.errors import HfHubHTTPError

    # The library that huggingface_hub speaks HTTP with has had several names; its errors are a base of the Hub's.
    transport = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")
    return any(isinstance(e, transport) and _response(e) is None for e in _chain(error))


def explain(error: BaseException, repository: str) -> str:
    """Return what went wrong as the first half of a sentence, without an end.

    Args:
        error: what a call to the Hub has raised.
        repository: its id.
    """
    from huggingface_hub import constants, errors

    chain, status, host = _chain(error), status_of(error), constants.ENDPOINT
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return "HF_HUB_OFFLINE is set; unset it to push"
    if is_broken_connection(error):
        unreachable = any(type(e).__name__ in ("ConnectError", "ConnectTimeout") for e in chain)
        return f"There is no connection to {host}" if unreachable else f"The connection to {host} was interrupted"
    if status == 401 and not any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return "The Hub does not accept the token; create a new one at https://huggingface.co/settings/tokens"
    if status == 403:
        return f"The token may not write to '{repository}'; it needs the permission 'write' for that account"
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return f"'{repository}' does not have this revision"
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return f"There is no repository '{repository}' on the Hub, or the token may not see it"
    if status in (409, 412):
        return f"'{repository}' was changed by someone else at the same time"
    if status == 429:
        wait = waiting_time(error)
        return "Too many requests to the Hub" + (f", which asks to wait {wait} seconds" if wait else "")
    if status is not None and status >= 500:
        return f"The Hub returned a server error (HTTP {status})"
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return f"The Hub refused: {reason}" if status else f"The upload failed with {type(error).__name__}: {reason}"


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and those that it came from."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found


def _response(error: BaseException) -> Any:
    for item in _chain(error):
        if (response := getattr(item, "response", None)) is not None:
            return response
    return None
