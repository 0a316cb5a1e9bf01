"""An endpoint with the OpenAI interface, over HTTP: time limits, bounded tries, one sentence when it fails."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from dsv4 import remote
from dsv4.errors import UserError, shown
from dsv4.probe.behaviour.endpoint import Answer, Endpoint, Messages, Params, Unanswered

KEY = "DSV4_ENDPOINT_KEY"  # the variable that has the key, unless another is named: a key goes to no server by accident
LONGEST_WAIT_S = 30.0
GIVE_UP = 40  # questions in a row without an answer: nothing is to be expected of the rest


class Server(Endpoint):
    """url: up to and with /v1. key_from: the environment variable with the key; none set: none is sent.

    timeout_s: of one try. tries: of one question, with waits between them that double, or are as long as the server
    asks for, up to half a minute. workers: questions that are asked at the same time.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_from: str = KEY,
        timeout_s: float = 120.0,
        tries: int = 4,
        workers: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--endpoint {shown(url)} is no URL: give one such as https://host/v1")
        if not model:
            raise UserError(f"--endpoint {url} needs --model NAME: the name that the server knows the model by")
        if key_from != KEY and key_from not in os.environ:
            raise UserError(f"the environment has no variable {key_from!r}: set it to the key, or name another")
        if tries < 1 or timeout_s <= 0 or workers < 1:
            raise UserError(f"tries={tries}, timeout_s={timeout_s} and workers={workers} must be positive")
        self.url, self.model, self.workers = url.rstrip("/"), model, workers
        self.name, self.identity = f"{model} at {self.url}", f"{self.url} {model}"
        self._key, self._key_from = os.environ.get(key_from, ""), key_from
        self._timeout_s, self._tries, self._sleep = timeout_s, tries, sleep
        self._limit = "max_tokens"  # newer servers of OpenAI know it by another name only
        self._failed, self._lock = 0, threading.Lock()

    def complete(self, asked: Messages | str, params: Params) -> Answer:
        try:
            answer = self._tried(asked, params)
        except Unanswered as failure:
            with self._lock:
                self._failed += 1
                failed = self._failed
            if failed >= GIVE_UP:
                raise UserError(
                    f"{self.url} left {failed} questions in a row without an answer (the last: {failure}): "
                    "mend it and run again; what was answered is kept"
                ) from None
            raise
        with self._lock:
            self._failed = 0
        return answer

    def _tried(self, asked: Messages | str, params: Params) -> Answer:
        reason = ""
        for attempt in range(self._tries):
            wait_s = min(LONGEST_WAIT_S, 0.5 * 2**attempt)
            try:
                return _answer(remote.ask(*self._request(asked, params), key=self._key, timeout_s=self._timeout_s))
            except remote.Refused as no:
                if no.status in (401, 403):
                    raise UserError(f"{no}: put a valid key into the environment variable {self._key_from}") from None
                if no.status == 404:
                    raise UserError(
                        f"{no}: is {self.model!r} the model's name, and the URL the one up to /v1?"
                    ) from None
                if self._limit == "max_tokens" and no.status == 400 and "max_completion_tokens" in no.told:
                    self._limit, wait_s = "max_completion_tokens", 0.0
                elif no.status not in (408, 409, 425, 429) and no.status < 500:
                    raise Unanswered(f"{no}") from None
                reason = str(no)
                wait_s = wait_s if no.wait_s is None else min(LONGEST_WAIT_S, no.wait_s)
            except remote.NoAnswer as silence:
                if silence.never_reached and attempt == self._tries - 1:
                    raise
                reason = str(silence)
            except Unanswered as garbled:
                reason = str(garbled)
            if attempt < self._tries - 1:
                self._sleep(wait_s)
        raise Unanswered(f"{self._tries} tries: {reason}")

    def _request(self, asked: Messages | str, params: Params) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self.model, self._limit: params.max_tokens, "temperature": params.temperature,
            "top_p": params.top_p,
        }  # fmt: skip
        if params.seed is not None:
            body["seed"] = params.seed
        if params.stop:
            body["stop"] = list(params.stop)
        if isinstance(asked, str):
            return f"{self.url}/completions", {**body, "prompt": asked}
        return f"{self.url}/chat/completions", {**body, "messages": [dict(m) for m in asked]}


def _answer(found: dict[str, Any]) -> Answer:
    """The text in a server's answer; Unanswered if there is none."""
    try:
        choice = found["choices"][0]
        message = choice.get("message")
        if message is None:
            text, reasoning = choice["text"], ""
        else:  # a refusal in a field of its own is what the user is told
            text = message.get("content") if message.get("content") is not None else message.get("refusal")
            reasoning = message.get("reasoning_content") or ""
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise TypeError
        finish = choice.get("finish_reason")
        return Answer(text, finish if isinstance(finish, str) else "stop", reasoning)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Unanswered("the answer holds no text where the OpenAI interface has one") from None
