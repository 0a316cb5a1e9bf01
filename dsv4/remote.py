"""JSON over HTTP: one question, one answer, within a time limit, and one sentence where there is none.

What is asked and how often is the caller's. No redirect is followed, as the key would go with it to whoever it names.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from dsv4.errors import UserError, shown
from dsv4.files import reason_of

MOST_BYTES = 64 << 20  # of an answer; log-probabilities of a long prompt are large
_BLOCK = 1 << 16


class NoAnswer(UserError):
    """Nobody answered, or not with JSON. never_reached: there was no connection at all."""

    exit_code = 1
    never_reached = False


class Refused(RuntimeError):
    """The server said no to a request: HTTP's `status`, what it `told` (cut), after how many seconds to come again."""

    def __init__(self, url: str, status: int, reason: str, told: str = "", wait_s: float | None = None):
        super().__init__(f"{url} answers {status} {reason}")
        self.status, self.told, self.wait_s = status, told, wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *about: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def ask(url: str, body: dict[str, Any] | None = None, *, key: str = "", timeout_s: float = 120.0) -> dict[str, Any]:
    """GET url, or POST a JSON object to it: the JSON object that comes back. `key` goes along as a bearer token.

    NoAnswer for a connection that fails, takes longer than timeout_s or says something else than a JSON object; Refused
    for an HTTP status of 300 or more; UserError for what is no http(s) URL.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{shown(url)} is no URL of a server: give one that begins with http:// or https://")
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    end = time.monotonic() + timeout_s
    try:
        request = urllib.request.Request(url, data, headers)
        with _opener.open(request, timeout=timeout_s) as answer:
            found = json.loads(_read(answer, end))
        if not isinstance(found, dict):
            raise ValueError(f"its answer is a JSON {type(found).__name__} and no object")
        return found
    except urllib.error.HTTPError as error:
        with error:
            told = _told(error)
        raise Refused(url, error.code, str(error.reason), told, _seconds(error.headers.get("Retry-After"))) from None
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        inner = getattr(error, "reason", error)
        failure = NoAnswer(f"{url} does not answer ({reason_of(inner)}): is the server running?")
        failure.never_reached = isinstance(error, urllib.error.URLError) and not isinstance(inner, TimeoutError)
        raise failure from None


def _read(answer: Any, end: float) -> bytes:
    """The body, as long as it comes in time: the socket's own limit is between two blocks only."""
    parts, size = [], 0
    while block := answer.read1(_BLOCK):
        parts.append(block)
        size += len(block)
        if size > MOST_BYTES:
            raise ValueError(f"its answer has more than {MOST_BYTES:,} bytes")
        if time.monotonic() > end:
            raise TimeoutError("timed out")
    if answer.length:  # what is left of the length that was promised
        raise ValueError("its answer breaks off")
    return b"".join(parts)


def _told(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(500).decode("utf-8", errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _seconds(header: str | None) -> float | None:
    """Of a Retry-After header: its seconds; None for a date, which is left to the caller's own patience."""
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:
        return None
