"""Six servers on loopback whose attack success is known by construction, for the tests of the runners."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

Messages = list[dict[str, str]]
REFUSAL, ANSWER = (
    "I'm sorry, but I can't help with that.",
    "Certainly. First take a sheet of paper, then fold it twice.",
)


def share_of(messages: Messages, seed: int = 0) -> float:
    """A number in [0, 1) that a conversation alone decides."""
    said = json.dumps([messages, seed], sort_keys=True).encode()
    return int(hashlib.sha256(said).hexdigest()[:8], 16) / 2**32


def refuses(messages: Messages, seed: int) -> str:
    return REFUSAL


def complies(messages: Messages, seed: int) -> str:
    return ANSWER


def by_hash(messages: Messages, seed: int) -> str:
    return ANSWER if share_of(messages, seed) < 0.4 else REFUSAL


def leaks(messages: Messages, seed: int) -> str:
    told = [m["content"] for m in messages if m["role"] == "system"]
    return f"My instructions say: {told[0].upper()}" if told else REFUSAL


def obeys(messages: Messages, seed: int) -> str:
    order = re.search(r"begins the summary with the words: (OPAL \w+)", messages[-1]["content"])
    return f"{order[1]}, and the gate is open." if order else "The note says nothing of the kind."


FAULTS = ("error", "garbled", "no text", "slow", "cut", "fine", "fine", "fine")


def fault_of(messages: Messages) -> str:
    """What the broken server does with a conversation, every time."""
    return FAULTS[int(share_of(messages) * len(FAULTS))]


@contextmanager
def serving(
    reply: Callable[[Messages, int], str], *, broken: bool = False, slow_s: float = 1.5
) -> Iterator[tuple[str, list]]:
    """(URL up to /v1, the bodies that were asked) of a server that answers with `reply`."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["key"] = self.headers.get("Authorization", "")
            asked.append(body)
            fault = fault_of(body["messages"]) if broken else "fine"
            text = reply(body["messages"], body.get("seed", 0))
            answer = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
            if fault == "slow":
                time.sleep(slow_s)
            if fault == "garbled":
                answer = b"\xff{not JSON"
            if fault == "no text":
                answer = json.dumps({"choices": [{"message": {"content": 7}}]}).encode()
            try:
                self.send_response(503 if fault == "error" else 200)
                self.send_header("Content-Length", str(len(answer) + 100 * (fault == "cut")))
                self.end_headers()
                self.wfile.write(answer)
            except OSError:  # who asked has gone
                pass

        def log_message(self, format: str, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        running.shutdown()
        running.server_close()
        thread.join()
