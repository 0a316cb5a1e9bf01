"""Answers that are kept as they come: one JSON line each, found by the hash of the question, so that a run goes on.

What a model wrote stands in answers.jsonl and nowhere else. It may be harmful where the questions were: questions
themselves are not kept, only their hashes. What got no answer is not kept either, and is asked again.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

from dsv4 import files
from dsv4.errors import UserError
from dsv4.probe.behaviour.endpoint import Answer, Endpoint, Messages, Params, Unanswered

FILE = "answers.jsonl"
REMEDY = "remove that line: its question is asked again"
Outcome = Answer | Unanswered
Question = tuple[Messages | str, Params]


def key_of(endpoint: Endpoint, asked: Messages | str, params: Params) -> str:
    """32 hex digits of the sha256 of all that an answer depends on."""
    said = asked if isinstance(asked, str) else [dict(m) for m in asked]
    facts = json.dumps([endpoint.identity, said, asdict(params)], sort_keys=True)
    return hashlib.sha256(facts.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Answers:
    """The answers of a folder; one process at a time. `close` lets others in."""

    def __init__(self, folder: Path):
        files.make_folder(folder)
        self._lock = files.FolderLock(folder)
        self._path = folder / FILE
        try:
            self._known = self._read()
            with files.explained(self._path):
                self._file = self._path.open("a", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise
        self._writing = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def _read(self) -> dict[str, Answer]:
        """What is there; a last line that a crash cut short is taken off the file."""
        if not self._path.exists():
            return {}
        with files.explained(self._path), self._path.open("r+b") as file:
            whole = file.read().rpartition(b"\n")
            if whole[2]:
                file.truncate(len(whole[0]) + len(whole[1]))
        known = {}
        for number, line in files.read_lines(self._path):
            row = files.parse_json(line, f"line {number} of {self._path}", REMEDY)
            try:
                known[row["key"]] = Answer(str(row["text"]), str(row["finish"]), str(row["reasoning"]))
            except KeyError as missing:
                raise UserError(f"line {number} of {self._path} has no {missing}; {REMEDY}") from None
        return known

    def get(self, key: str) -> Answer | None:
        return self._known.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer: it is in the file when this returns."""
        line = json.dumps({"key": key, **asdict(answer)})
        with self._writing, files.explained(self._path, safe="the answers before it are kept"):
            self._file.write(line + "\n")
            self._file.flush()
            self._known[key] = answer

    def close(self) -> None:
        self._file.close()
        self._lock.release()


def _ends_all(future: Future[Answer]) -> bool:
    """Whether what came of a question is a reason to ask no other."""
    return not isinstance(future.exception(), Unanswered | None)


def ask_all(
    endpoint: Endpoint,
    questions: Sequence[Question],
    answers: Answers,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[Outcome]:
    """What came of each question: kept answers are not asked for again. show: called with (questions done, in all).

    Ctrl-C, and whatever means that nothing will be answered, ends it at once; what was answered is kept.
    """
    outcomes: list[Outcome | None] = []
    todo: dict[str, list[int]] = {}
    for place, (asked, params) in enumerate(questions):
        key = key_of(endpoint, asked, params)
        outcomes.append(answers.get(key))
        if outcomes[-1] is None:
            todo.setdefault(key, []).append(place)  # the same question twice is asked once
    done = len(questions) - sum(map(len, todo.values()))
    show(done, len(questions))
    pool = ThreadPoolExecutor(endpoint.workers, thread_name_prefix="asking")
    try:
        waiting: dict[Future[Answer], str] = {}
        line = iter(todo)
        while True:
            while len(waiting) < 2 * endpoint.workers and (key := next(line, None)) is not None:
                waiting[pool.submit(endpoint.complete, *questions[todo[key][0]])] = key
            if not waiting:
                break
            finished = wait(waiting, return_when=FIRST_COMPLETED).done
            for future in sorted(finished, key=_ends_all):  # answers are kept before something ends it all
                key = waiting.pop(future)
                try:
                    outcome: Outcome = future.result()
                    answers.put(key, outcome)
                except Unanswered as failure:
                    outcome = failure
                for place in todo[key]:
                    outcomes[place] = outcome
                done += len(todo[key])
                show(done, len(questions))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    assert all(outcome is not None for outcome in outcomes)
    return [outcome for outcome in outcomes if outcome is not None]
