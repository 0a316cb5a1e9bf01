"""A model of ours as an endpoint: one thread owns the engine, so whoever asks at the same time runs in one batch."""

import atexit
import hashlib
import json
import threading
from concurrent.futures import Future
from typing import Any, Literal

from dsv4.engine import Completion, Engine, SamplingParams
from dsv4.errors import UserError
from dsv4.probe.behaviour.endpoint import Answer, Endpoint, Messages, Params, Unanswered
from dsv4.text import Tokenizer, read_reply, render

Form = Literal["chat", "plain"]
_NEEDED = ("<｜User｜>", "<｜Assistant｜>", "</think>")


def form_of(tokenizer: Tokenizer) -> Form:
    """How a conversation is said to a model: "chat", V4's format, where the tokenizer has its control tokens, else
    "plain": a transcript with names, which a base model may continue."""
    return "chat" if all(tokenizer.token_id(name) is not None for name in _NEEDED) else "plain"


class InProcess(Endpoint):
    """An engine. form: see form_of; None: what its tokenizer allows. thinking: the model reasons before it answers.

    `close` ends the thread; the engine must not be used by others until then.
    """

    def __init__(self, engine: Engine, name: str = "a model", *, form: Form | None = None, thinking: bool = False):
        self._engine, self._thinking = engine, thinking
        self.form: Form = form or form_of(engine.tokenizer)
        if thinking and self.form == "plain":
            raise UserError("thinking needs the chat format, whose tokens this tokenizer has not: leave it out")
        self.name, self.workers = name, engine.scheduler.max_batch
        self.dtype = str(engine.model.compute_dtype).removeprefix("torch.")
        self.config_hash = _hash(engine.config.to_json())
        self.identity = " ".join(
            [_weights(engine), engine.tokenizer.fingerprint(), self.dtype, self.form, "thinking" * thinking]
        )
        self._turn = threading.Condition()
        self._line: list[tuple[list[int], SamplingParams, Future[Completion]]] = []
        self._closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="engine")
        self._thread.start()
        atexit.register(self.close)  # a thread inside the engine while the interpreter goes would bring it down

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        return self._engine.config.max_position_embeddings

    def count_tokens(self, text: str) -> int:
        return len(self._engine.tokenizer.encode(text))

    def ids(self, asked: Messages | str) -> list[int]:
        """The prompt of a conversation, or of a text, as ids."""
        if isinstance(asked, str):
            return self._engine.encode(asked)
        if self.form == "chat":
            return render(list(asked), thinking=self._thinking).ids(self._engine.tokenizer)
        return self._engine.encode(transcript(asked))

    def complete(self, asked: Messages | str, params: Params) -> Answer:
        return self.answer(asked, self.run(asked, params), params)

    def run(self, asked: Messages | str, params: Params) -> Completion:
        """What the engine makes of it; Unanswered if it is too long, or if the model's numbers are not finite."""
        chat = not isinstance(asked, str)
        stop = params.stop if not chat or self.form == "chat" else (*params.stop, "\nUser:", "\nSystem:")
        drawn = SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            seed=params.seed,
            max_tokens=params.max_tokens,
            stop=stop,
        )
        future: Future[Completion] = Future()
        ids = self.ids(asked)
        with self._turn:
            if self._closed:
                raise UserError("this endpoint is closed: make another")
            self._line.append((ids, drawn, future))
            self._turn.notify()
        try:
            done = future.result()
        except UserError as error:  # of this request alone: others are not touched
            raise Unanswered(str(error)) from None
        if done.finish_reason == "error":
            raise Unanswered("the model's numbers are not finite")
        return done

    def answer(self, asked: Messages | str, done: Completion, params: Params) -> Answer:
        """The answer in a completion: reasoning apart from the text."""
        if isinstance(asked, str) or self.form == "plain":
            return Answer(done.text.strip() if not isinstance(asked, str) else done.text, done.finish_reason)
        reply = read_reply(done.ids, thinking=self._thinking, tokenizer=self._engine.tokenizer).message
        text = reply.get("content") or ""
        for stop in params.stop:
            text = text.partition(stop)[0]
        return Answer(text, done.finish_reason, reply.get("reasoning_content") or "")

    def close(self) -> None:
        """End the thread; what is still open is left without an answer."""
        with self._turn:
            self._closed = True
            self._turn.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def _serve(self) -> None:
        running: dict[int, Future[Completion]] = {}
        while True:
            with self._turn:
                while not self._line and not running and not self._closed:
                    self._turn.wait()
                new, self._line = self._line, []
                if self._closed:
                    break
            for ids, params, future in new:
                try:
                    running[self._engine.add(ids, params)] = future
                except Exception as error:
                    future.set_exception(error)
            try:
                for event in self._engine.step():
                    if event.completion:
                        running.pop(event.request).set_result(event.completion)
            except Exception as error:  # a failure of ours, or no memory: whoever waits is told
                for number, future in running.items():
                    self._engine.cancel(number)
                    future.set_exception(error)
                running.clear()
        for number in running:
            self._engine.cancel(number)
        for future in [*running.values(), *(future for _, _, future in new)]:
            future.set_exception(UserError("the endpoint was closed"))


def transcript(messages: Messages) -> str:
    """A conversation as a plain text with names, up to where the assistant speaks."""
    names = {"system": "System", "user": "User", "assistant": "Assistant"}
    lines = [f"{names.get(m['role'], m['role'])}: {m['content']}" for m in messages]
    return "\n\n".join([*lines, "Assistant:"])


def _hash(value: Any) -> str:
    """16 hex digits of the sha256 of plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _weights(engine: Engine) -> str:
    """16 hex digits that tell models apart: the configuration, and up to 4,096 numbers of every tensor."""
    digest = hashlib.sha256(_hash(engine.config.to_json()).encode())
    for name, tensor in sorted([*engine.model.named_parameters(), *engine.model.named_buffers()]):
        flat = tensor.detach().flatten()
        digest.update(name.encode() + flat[:: max(1, len(flat) // 4096)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
