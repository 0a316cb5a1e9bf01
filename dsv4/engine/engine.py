"""The engine: requests of any length run together, and each gets what it would get alone.

`step` is the whole story: schedule, run, sample, finish. Who runs is scheduler.py, the model call runner.py, the
draw sampler.py, both with drafts speculative.py, text and stop strings writer.py; a conversation over one memory is
session.py.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from dsv4.checkpoint import load, read_config, resolve_checkpoint
from dsv4.engine.interrupt import held_back
from dsv4.engine.runner import Runner
from dsv4.engine.sampler import BROKEN, logprobs, sample
from dsv4.engine.scheduler import Scheduler, Share
from dsv4.engine.speculative import Speculation, check_depth
from dsv4.engine.types import Completion, Drawn, Event, FinishReason, Request, SamplingParams
from dsv4.engine.writer import TextWriter
from dsv4.errors import UserError
from dsv4.model import LanguageModel, Memory, check_pinned
from dsv4.text import Tokenizer, load_tokenizer


class Events(Iterator[Event]):
    """The events of a request as they happen. Closed at any time, or dropped, it ends the request.

    A generator alone would not do: one that was never started skips its `finally`.
    """

    def __init__(self, events: Generator[Event, None, None], at_end: Callable[[], None]):
        self._events, self._at_end = events, at_end
        self._open = True

    def __next__(self) -> Event:
        try:
            return next(self._events)
        except BaseException:  # the last event is out, or the step failed or was interrupted
            self.close()
            raise

    def close(self) -> None:
        """Ask for no more; what has to be done at the end is done once."""
        if self._open:
            self._open = False
            self._events.close()
            self._at_end()

    def __del__(self) -> None:
        self.close()


class Engine:
    """Generates text with a model and its tokenizer. It ends at the tokenizer's eos or at any of the model's own.

    A prompt is a text, which gets a bos in front, or token ids, which are taken as they are (none: a bos alone).

    max_batch: requests that run at the same time; more wait in line. tokens_per_step: prompts are computed in
    chunks beside the tokens of running requests, so that no step has more tokens than this. memory_format: of the
    caches (default: the model's). max_rewind: how many tokens a Session can go back without computing any again. pages:
    of 128 tokens, in which all caches lie, allocated at once: who finds no room waits, and the youngest gives way to
    those before it until there is room again; None: as many as are needed.

    speculative: how many tokens a step drafts with the model's MTP block or DSpark drafter and verifies in the step
    after; 0 is off. The tokens are those of plain decoding where a request is greedy (to the bit with the C++ ops;
    elsewhere the order of sums depends on the batch, and a tie of two tokens may fall differently), and distributed as
    there where it is not: the same seed draws the same text whatever else is in the batch, but not the text that it
    draws without speculation or with another number of drafts.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        tokens_per_step: int = 2048,
        memory_format: torch.dtype | str | None = None,
        max_rewind: int = 0,
        pages: int | None = None,
        speculative: int = 0,
    ):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model {model.config.vocab_size}: "
                "use the tokenizer that the model was trained with"
            )
        check_depth(speculative, len(model.mtp))
        self.config, self.tokenizer = model.config, tokenizer
        self.stop_ids = frozenset((tokenizer.eos_id, *model.stop_ids))
        back = max_rewind + Speculation.max_rewind(speculative)
        self.pool = model.new_pool(memory_format, pages=pages, max_rewind=back, mtp=speculative > 0)
        self.scheduler = Scheduler(max_batch, tokens_per_step, self.pool, drafts=speculative)
        self.runner = Runner(model)
        self.speculation = Speculation(model, speculative, tokenizer.vocab_size) if speculative else None
        self._numbers = count()
        self._news: list[Event] = []  # events that nobody has been given yet

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str = "float32",
        device: torch.device | str = "cpu",
        weights: Literal["plain", "released"] = "plain",
        numbers: str = "plain",
        memory: int | str | None = None,
        **options: Any,
    ) -> "Engine":
        """The engine of a run folder (its latest checkpoint) or a checkpoint folder. dtype, device, weights, numbers
        and memory are those of `load`; `options` are those of Engine.

        UserError, before any weight is read, if model or tokenizer is missing or damaged, or if the model has
        nothing to draft with for speculative=n.
        """
        folder = resolve_checkpoint(path)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder} has no tokenizer.json: copy in the one that the model was trained with")
        tokenizer = load_tokenizer(folder)
        check_depth(options.get("speculative", 0), getattr(read_config(folder), "num_draft_blocks", 0))
        model = load(folder, dtype=dtype, device=device, weights=weights, numbers=numbers, memory=memory)
        return cls(model, tokenizer, **options)

    @property
    def model(self) -> LanguageModel:
        """The model that generates."""
        return self.runner.model

    def step(self) -> list[Event]:
        """One call of the model for all running requests, and one event for each that got a token; with speculation the
        drafter is called as well, and an event may have several tokens.

        Ctrl-C is raised at its end: all that was computed is kept, and what is new comes with the next step. If it
        fails, or a second Ctrl-C stops it half way, only time is lost: the memories it was filling are computed again,
        and the next step goes on.
        """
        with held_back():
            shares = self.scheduler.schedule()
            with _recomputed_if_stopped(shares):
                drawn = self._draw(shares) if self.speculation is None else self.speculation.draw(shares)
                for one in drawn:
                    self._news.append(self._finish(one))
        news, self._news = self._news, []
        return news

    def add(self, prompt: str | list[int], params: SamplingParams | None = None) -> int:
        """Put a request in line; returns its number. UserError if it can never run; others are not touched."""
        return self.submit(self.prepare(self.encode(prompt), params or SamplingParams()))

    def cancel(self, number: int) -> None:
        """Forget a request and its news; one that has ended, or never was, is no error."""
        for request in self.scheduler:
            if request.number == number:
                self.scheduler.remove(request)
                request.forget()
                break
        self._news = [e for e in self._news if e.request != number]

    def follow(self, number: int) -> Events:
        """Step until a request ends, giving its events; the request is cancelled when the caller stops early.

        News of other requests is kept for `step` and for whoever follows them: several may be followed at once.
        """
        return Events(self.events_of(number), lambda: self.cancel(number))

    def events_of(self, number: int) -> Generator[Event, None, None]:
        """Step until a request ends, giving its events; nothing happens to it when the caller stops early."""
        while number in [*(r.number for r in self.scheduler), *(e.request for e in self._news)]:
            try:
                self._news = self.step()
            except KeyboardInterrupt:  # after a whole step: what it brought is told first
                yield from self._told(number)
                raise
            yield from self._told(number)

    def _told(self, number: int) -> list[Event]:
        """A request's news, which are given now."""
        own = [e for e in self._news if e.request == number]
        self._news = [e for e in self._news if e.request != number]
        return own

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None) -> Events:
        """The events of a new request as they happen; the last one has its completion. Checked at once."""
        return self.follow(self.add(prompt, params))

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """The completions of all prompts, run together; `params` for all of them, or one for each.

        All are checked before any runs. Equal prompts with the same seed give equal texts.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts={prompts[:20]!r}... is a single text: give a list of prompts")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise UserError(f"{len(params)} sampling parameters for {len(prompts)} prompts: give one or all")
        requests = [self.prepare(self.encode(p), s) for p, s in zip(prompts, params, strict=True)]
        numbers = [self.submit(r) for r in requests]
        try:
            return [event.completion for n in numbers for event in self.follow(n) if event.completion]
        finally:
            for n in numbers:
                self.cancel(n)

    # --- a request before it runs: `add` in pieces, which Session puts together in its own way -------------------

    def encode(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt, with the bos that a text or an empty prompt needs."""
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        return list(prompt) or [self.tokenizer.bos_id]

    def prepare(
        self, ids: list[int], params: SamplingParams, memory: Memory | None = None, *, lasting: bool = False
    ) -> Request:
        """A checked request that is not in line yet; `memory` has seen the first tokens of ids already. lasting: what
        it remembers is needed when it has ended."""
        for i in ids:
            if not isinstance(i, int) or not 0 <= i < self.config.vocab_size:
                size = self.config.vocab_size
                raise UserError(f"token id {i!r} must be a whole number below vocab_size={size}")
        context = self.config.max_position_embeddings
        if len(ids) + 1 > context:
            raise UserError(
                f"a prompt of {len(ids)} tokens leaves no room for a new one: "
                f"max_position_embeddings={context}; shorten the prompt"
            )
        if params.pinned > len(ids):
            raise UserError(f"pinned={params.pinned} of a prompt of {len(ids)} tokens: pin at most those")
        if params.pinned:
            check_pinned(self.config, params.pinned)
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if params.seed is None else params.seed)
        limit = min(len(ids) + params.max_tokens, context)
        writer = TextWriter(self.tokenizer, params.stop)
        request = Request(next(self._numbers), list(ids), params, limit, writer, generator, memory, lasting=lasting)
        self.scheduler.check(request)
        return request

    def submit(self, request: Request) -> int:
        """Put a prepared request in line; returns its number."""
        assert request.pending > 0, "nothing to compute: the logits of the last token are gone"
        self.scheduler.add(request)
        return request.number

    # --- the rest of a step --------------------------------------------------------------------------------------

    def _draw(self, shares: Sequence[Share]) -> list[Drawn]:
        """Run the shares and draw a token for each request of which nothing is pending then."""
        ready, logits = self.runner.run(shares)
        logits = logits[:, : self.tokenizer.vocab_size]  # a model's vocabulary may be padded
        params = [r.params for r in ready]
        tokens = sample(logits, params, [r.generator for r in ready])
        told = logprobs(logits, params, tokens)
        return [Drawn(r, [t], () if x is None else (x,)) for r, t, x in zip(ready, tokens, told, strict=True)]

    def _finish(self, drawn: Drawn) -> Event:
        """Enter drawn tokens until the request ends: the text that they let out, and whether it ends with one."""
        request = drawn.request
        text, reason, before = "", None, len(request.ids)
        judged, request.drafts = request.drafts, ()  # first: those that are judged are not drafts of what comes next
        for token in drawn.tokens:
            more, reason = self._enter(request, token)
            text += more
            if reason:
                break
        new = tuple(request.ids[before:])
        news = drawn.logprobs[: len(new)]
        request.logprobs += news
        request.drafted += len(judged)
        request.accepted += min(len(new), len(drawn.tokens) - 1)
        request.text += text
        if reason is None:
            request.drafts = drawn.drafts
            return Event(request.number, new, text, logprobs=news)
        return Event(request.number, new, text, reason, self._end(request, reason), news)

    def _enter(self, request: Request, token: int) -> tuple[str, FinishReason | None]:
        """Enter a drawn token: the text that it lets out, and why the request ends with it, if it does."""
        if token == BROKEN:
            return request.writer.flush(), "error"
        request.ids.append(token)
        if token in self.stop_ids:  # not written, whether or not the tokenizer knows it as a special token
            return request.writer.flush(), "stop"
        text = request.writer.push(token)
        if request.writer.stopped:
            return text, "stop"
        if len(request.ids) == request.limit:
            text += request.writer.flush()
            return text, "stop" if request.writer.stopped else "length"
        return text, None

    def _end(self, request: Request, reason: FinishReason) -> Completion:
        request.finish_reason = reason
        self.scheduler.remove(request)
        completion = request.completion()
        request.forget()
        return completion


@contextmanager
def _recomputed_if_stopped(shares: Sequence[Share]) -> Iterator[None]:
    """Whatever stops a step half way leaves torn memories: drop them, their tokens are still known."""
    try:
        yield
    except BaseException:
        for share in shares:
            share.request.memory = None
        raise
