"""The adapter for a server with the OpenAI completions interface: log-probabilities over HTTP, whole models alone.

The server must have loaded the kit's model (`dsv4 conform --write DIR`, then DIR/model), take prompts as token ids, and
name tokens by id, as vLLM does with `return_tokens_as_token_ids`. Where it echoes prompts with log-probabilities, or
tells `prompt_logprobs` as vLLM does (which echoes none without a tokenizer), every position is compared, else the last
one of each request.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4 import remote
from dsv4.conform.adapter import Adapter, Best, Missing
from dsv4.errors import UserError

PREFIX = "token_id:"
_TELLING = ("echo", "prompt_logprobs", "")  # ways to hear of a prompt's own positions, the best known one first


class Server(Adapter):
    """url: up to and with /v1; best: how many log-probabilities to ask for at each position."""

    def __init__(self, url: str, dtype: torch.dtype = torch.float32, best: int = 5, timeout_s: float = 120.0):
        self.url, self.dtype, self.best, self.timeout_s = url.rstrip("/"), dtype, best, timeout_s
        self.name = f"server at {self.url}"
        self.ways = list(_TELLING)  # those that the server has not refused

    def load(self, folder: Path) -> None:
        """Ask for the name of its model."""
        found = self._ask("models", None).get("data")
        if not found or "id" not in found[0]:
            raise UserError(f"{self.url}/models names no model: start the server with the model that --write makes")
        self.model = found[0]["id"]

    def logits(self, ids: Tensor, calls: list[int]) -> Best:
        """A request for every call, the sequence being a longer prompt each time: a server keeps or computes anew."""
        if min(calls) < 0:
            raise Missing("a memory that takes tokens back")
        end, parts = 0, []
        for number, n in enumerate(calls):
            end += n
            parts.append(self._rows(ids[:end], all_rows=number == 0))
        rows, tokens, logprobs = (torch.cat(x) for x in zip(*parts, strict=True))
        return Best(rows, tokens, logprobs)

    def batch(self, ids: list[Tensor]) -> list[Any]:
        with ThreadPoolExecutor(len(ids)) as pool:
            return list(pool.map(lambda part: Best(*self._rows(part, all_rows=True)), ids))

    def _rows(self, ids: Tensor, *, all_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
        """rows [n], the best tokens after each [n, best] (-1: fewer were told), their log-probabilities."""
        body = {
            "model": self.model, "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0.0, "logprobs": self.best,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        for way in list(self.ways) if all_rows else ("",):
            more = {"echo": {"echo": True}, "prompt_logprobs": {"prompt_logprobs": self.best}}.get(way, {})
            try:
                return self._read(self._ask("completions", {**body, **more}), len(ids))
            except remote.Refused:
                if not more:
                    raise
                if way in self.ways:  # another thread may have taken it out
                    self.ways.remove(way)
        raise AssertionError("the last way asks for nothing that can be refused")

    def _read(self, answer: dict[str, Any], n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The last rows of n, as many as are told. A list for the prompt begins with its first token, before which is
        no row; an echo has the row after the prompt at its end, `prompt_logprobs` leaves it to the answer's list."""
        try:
            choice = answer["choices"][0]
            told = choice["logprobs"]["top_logprobs"]
            before = choice.get("prompt_logprobs") or []
        except (KeyError, IndexError, TypeError):
            raise Missing("log-probabilities of the likeliest tokens") from None
        told = [_by_id(row) for row in before[1:]] + told
        told = told[1:] if len(told) > n else told
        tokens = torch.full((len(told), self.best), -1)
        logprobs = torch.zeros(len(told), self.best)
        for row, pairs in enumerate(told):
            for place, (token, logprob) in enumerate(list(pairs.items())[: self.best]):
                if not token.startswith(PREFIX):
                    raise Missing("tokens named by id (return_tokens_as_token_ids)")
                tokens[row, place], logprobs[row, place] = int(token.removeprefix(PREFIX)), logprob
        return torch.arange(n - len(told), n), tokens, logprobs

    def _ask(self, what: str, body: dict[str, Any] | None) -> dict[str, Any]:
        return remote.ask(f"{self.url}/{what}", body, timeout_s=self.timeout_s)


def _by_id(row: dict[str, Any]) -> dict[str, float]:
    """A row of `prompt_logprobs` as one of `top_logprobs`: likeliest first, as the prompt's own token is among them."""
    pairs = sorted(((item["logprob"], token) for token, item in row.items()), reverse=True)
    return {f"{PREFIX}{token}": logprob for logprob, token in pairs}
