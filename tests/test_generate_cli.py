"""Failures caught here: `dsv4 generate` and `dsv4 chat` that open the wrong checkpoint, print something else than the
engine says, or answer wrong use with anything but one sentence and exit code 2.
"""

import io
import json
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dsv4.cli
from dsv4.checkpoint import load, resolve_checkpoint, save
from dsv4.cli.common import resolve_device
from dsv4.engine import Completion, Engine, SamplingParams
from dsv4.errors import UserError
from dsv4.measure.subjects import small_model
from dsv4.text import ByteTokenizer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run with two checkpoints, of which `latest` names the second."""
    folder = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("step-000001", "step-000002")):
        save(small_model(vocab_size=258, max_position_embeddings=300, seed=seed), folder / "checkpoints" / name)
        ByteTokenizer().save(folder / "checkpoints" / name)
    (folder / "checkpoints" / "latest").write_text("step-000002\n")
    return folder


@pytest.fixture
def dsv4_run(monkeypatch, capfd):
    """`dsv4 ...` as from a shell: (exit code, stdout, stderr)."""

    def call(*arguments: object, typed: str | bytes = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dsv4", *map(str, arguments)])
        piped = io.BytesIO(typed.encode() if isinstance(typed, str) else typed)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(piped, encoding="cp1252"))  # whatever the console has
        capfd.readouterr()
        try:
            dsv4.cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return call


def expected(folder: Path, prompts: list[str], **params) -> list[Completion]:
    return Engine.open(folder).generate(prompts, SamplingParams(**params))


GREEDY = {"temperature": 0, "max_tokens": 8}
OPTIONS = ("--temperature", 0, "--max-tokens", 8)


def test_a_run_folder_means_its_latest_checkpoint(run_folder, dsv4_run):
    code, out, err = dsv4_run("generate", run_folder, "Call me", *OPTIONS)
    text = expected(run_folder / "checkpoints" / "step-000002", ["Call me"], **GREEDY)[0].text
    assert (code, out) == (0, f"Call me{text}\n")
    assert "8 new tokens after 8 of prompt" in err and "tokens/s" in err and "bytes" in err
    code, first, _ = dsv4_run("generate", run_folder / "checkpoints" / "step-000001", "Call me", *OPTIONS)
    assert code == 0 and first.startswith("Call me") and first != out


def test_threads_are_those_asked_for(run_folder, dsv4_run, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    plain = dsv4_run("generate", run_folder, "Call me", *OPTIONS)[1]
    assert asked == [] and dsv4_run("generate", run_folder, "Call me", *OPTIONS, "--threads", 2)[1] == plain
    assert dsv4_run("chat", run_folder, *OPTIONS, "--threads", 3, typed="/quit\n")[0] == 0
    assert asked == [2, 3] and dsv4_run("generate", run_folder, "x", "--threads", -1)[0] == 2


def test_several_prompts_in_order(run_folder, dsv4_run, tmp_path):
    (tmp_path / "prompts.txt").write_text("three three\n\nfour é\n", encoding="utf-8")
    more = ("--prompt", "two", "--prompt-file", tmp_path / "prompts.txt")
    code, out, _ = dsv4_run("generate", run_folder, "one", *more, *OPTIONS)
    prompts = ["one", "two", "three three", "four é"]
    done = expected(run_folder, prompts, **GREEDY)
    assert code == 0
    assert out == "\n".join(f"{p}{c.text}\n" for p, c in zip(prompts, done, strict=True))


def test_a_prompt_file_is_utf_8_and_its_lines_end_at_line_ends_alone(run_folder, dsv4_run, tmp_path):
    """A byte-order mark is no character of the first prompt, and U+2028, U+000B, U+000C end no line."""
    prompts = ["é first", "a\u2028b", "c\x0bd\x0ce\x1c", "last"]
    for end in ("\n", "\r\n"):
        (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + end.join(prompts).encode() + end.encode())
        code, out, err = dsv4_run("generate", run_folder, "--prompt-file", tmp_path / "p.txt", *OPTIONS, "--json")
        assert code == 0, err
        assert [c["prompt"] for c in json.loads(out)["completions"]] == prompts


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_a_prompt_file_of_another_encoding_is_refused(run_folder, dsv4_run, tmp_path, encoding):
    """UTF-16 without a mark is valid UTF-8 full of NULs."""
    (tmp_path / "p.txt").write_bytes(
        "caf\u00e9 au lait\n".encode(encoding) if encoding == "cp1252" else "au lait\n".encode(encoding)
    )
    code, out, err = dsv4_run("generate", run_folder, "--prompt-file", tmp_path / "p.txt", *OPTIONS)
    assert code == 2 and "save it as UTF-8" in err and err.count("\n") == 1 and not out


def test_a_prompt_of_several_lines_comes_from_stdin(run_folder, dsv4_run):
    typed = b"\xef\xbb\xbf" + "It was a dark\r\n\r\nand stormy\u2028 night é\n".encode()
    code, out, err = dsv4_run("generate", run_folder, "-", *OPTIONS, "--json", typed=typed)
    assert code == 0, err
    assert json.loads(out)["completions"][0]["prompt"] == "It was a dark\n\nand stormy\u2028 night é"


def test_json_is_one_object_with_everything(run_folder, dsv4_run):
    options = ("--temperature", 0.8, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--seed", 3, "--max-tokens", 9)
    code, out, _ = dsv4_run("generate", run_folder, "one", "--prompt", "", *options, "--json")
    done = expected(run_folder, ["one", ""], temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, seed=3, max_tokens=9)
    report = json.loads(out)
    assert code == 0
    assert [c["ids"] for c in report["completions"]] == [c.ids for c in done]
    assert [c["text"] for c in report["completions"]] == [c.text for c in done]
    assert [c["prompt_tokens"] for c in report["completions"]] == [4, 1]
    assert all("logprobs" not in c for c in report["completions"])
    assert report["new_tokens"] == sum(len(c.ids) for c in done)
    assert report["memory_bytes"] == sum(c.memory_bytes for c in done)


def test_logprobs_stand_in_the_json(run_folder, dsv4_run):
    code, out, _ = dsv4_run("generate", run_folder, "one", *OPTIONS, "--logprobs", 2, "--json")
    row = json.loads(out)["completions"][0]
    assert code == 0 and [x["token"] for x in row["logprobs"]] == row["ids"]
    for x in row["logprobs"]:  # greedy: the drawn token is the likeliest
        assert len(x["top"]) == 2 and x["top"][0] == [x["token"], x["logprob"]] and x["logprob"] < 0
    code, _, err = dsv4_run("generate", run_folder, "one", *OPTIONS, "--logprobs", 2)
    assert code == 2 and "add --json" in err


def test_stop_strings_and_no_prompt(run_folder, dsv4_run):
    text = expected(run_folder, [""], **GREEDY)[0].text
    assert dsv4_run("generate", run_folder, "--stop", text[3], *OPTIONS)[:2] == (0, text[: text.index(text[3])] + "\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere does not exist: give the folder"),
        (["RUN/checkpoints/latest"], "is a file: give the folder"),
        (["EMPTY"], "holds neither config.json nor checkpoints/latest"),
        (["RUN", "x", "--device", "cuda:99"], "device 'cuda:99' is not available: this machine has cpu"),
        (["RUN", "x", "--dtype", "int8"], "dtype 'int8' is unknown: use one of float32"),
        (["RUN", "x", "--top-p", "2"], "top_p=2.0 must be"),
        (["RUN", "x" * 300], "max_position_embeddings=300; shorten the prompt"),
        (["RUN", "--prompt-file", "nowhere"], "cannot read nowhere: No such file"),
        (["RUN", "--prompt-file", "EMPTY/none.txt"], "holds no prompt"),
    ],
)
def test_wrong_use_is_one_sentence_and_code_2(run_folder, dsv4_run, tmp_path, arguments, says):
    (tmp_path / "none.txt").write_text("\n")
    arguments = [a.replace("RUN", str(run_folder)).replace("EMPTY", str(tmp_path)) for a in arguments]
    code, out, err = dsv4_run("generate", *arguments)
    assert code == 2 and says in err and err.count("\n") == 1 and not out


def test_usage_errors_of_the_shell(run_folder):
    for arguments in (["generate", str(run_folder), "--no-such"], ["chat", str(run_folder), "a", "b"]):
        assert CliRunner().invoke(dsv4.cli.application(), arguments).exit_code == 2
    for arguments in (["generate"], ["chat"], ["generate", str(run_folder), "text", "--from-hub", "a/b"]):
        error = CliRunner().invoke(dsv4.cli.application(), arguments).exception
        assert isinstance(error, UserError) and "the folder of a model or --from-hub NAME, and not both" in str(error)
    for verb in ("generate", "chat"):
        result = CliRunner().invoke(dsv4.cli.application(), [verb, "--help"])
        assert result.exit_code == 0 and f"Example: dsv4 {verb}" in result.output


def test_what_a_folder_can_lack(run_folder, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    with pytest.raises(UserError, match="no finished checkpoint yet"):
        resolve_checkpoint(tmp_path)
    for name in ("step-000009", "../checkpoints", "", "."):
        (checkpoints / "latest").write_text(name)
        with pytest.raises(UserError, match="not a checkpoint beside it: no checkpoint is left"):
            resolve_checkpoint(tmp_path)
    save(load(resolve_checkpoint(run_folder)), checkpoints / "step-000009")
    (checkpoints / "latest").write_text("step-000009")
    with pytest.raises(UserError, match="has no tokenizer.json: copy in the one"):
        Engine.open(tmp_path)
    ByteTokenizer().save(checkpoints / "step-000009")
    weights = checkpoints / "step-000009" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        Engine.open(tmp_path)


def test_dtype_and_device(run_folder):
    model = Engine.open(run_folder, device="cpu", dtype="bfloat16").model
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def drafting(tmp_path_factory) -> Path:
    """A model with an MTP block."""
    folder = tmp_path_factory.mktemp("drafting")
    save(small_model(vocab_size=258, max_position_embeddings=300, mtp=1), folder)
    ByteTokenizer().save(folder)
    return folder


def test_speculation_changes_no_greedy_text_and_is_accounted_for(drafting, run_folder, dsv4_run):
    texts = ("one", "--prompt", "two two")
    plain = dsv4_run("generate", drafting, *texts, *OPTIONS)
    code, out, err = dsv4_run("generate", drafting, *texts, *OPTIONS, "--speculative", 2)
    assert code == 0 and out == plain[1] and "accepted" not in plain[2]
    done = Engine.open(drafting, speculative=2).generate(["one", "two two"], SamplingParams(**GREEDY))
    drafted, accepted = sum(c.drafted for c in done), sum(c.accepted for c in done)
    assert drafted and f"{accepted} of {drafted} drafted tokens were accepted (" in err and "for 16 new tokens" in err
    code, out, _ = dsv4_run("generate", drafting, *texts, *OPTIONS, "--speculative", 2, "--json")
    rows = json.loads(out)["completions"]
    assert [(r["drafted"], r["accepted"]) for r in rows] == [(c.drafted, c.accepted) for c in done]
    code, out, err = dsv4_run("generate", run_folder, *texts, *OPTIONS, "--speculative", 2)
    assert code == 2 and "speculative=2, but the model has no MTP block" in err and err.count("\n") == 1 and not out
    assert "too short" in dsv4_run("generate", drafting, "x", "--max-tokens", 1, "--speculative", 1)[2]


def test_a_chat_with_speculation_is_the_same_chat(drafting, dsv4_run):
    typed = "It was\n\nThen\n/undo\nThen\n/quit\n"
    _, plain, _ = dsv4_run("chat", drafting, *OPTIONS, typed=typed)
    code, out, _ = dsv4_run("chat", drafting, *OPTIONS, "--speculative", 1, typed=typed)
    assert code == 0 and out.startswith(plain.removesuffix("\n")) and out != plain
    assert "drafted tokens were accepted" in out.splitlines()[-1]


# --- chat ------------------------------------------------------------------------------------------------------------


def chat_lines(out: str) -> list[str]:
    """What followed each `you> `."""
    return [part.removesuffix("\n") for part in out.split("you> ")[1:]]


def test_chat_continues_one_text(run_folder, dsv4_run):
    code, out, _ = dsv4_run("chat", run_folder, *OPTIONS, typed="It was\n\nThen\n/undo\nThen\n/quit\nnever\n")
    engine = Engine.open(run_folder)
    ids, replies = [0], []
    for said in (b"It was", b"", b"\nThen"):
        ids += [b + 2 for b in said]
        done = engine.generate([ids], SamplingParams(**GREEDY))[0]
        ids += done.ids
        replies.append(done.text)
    assert code == 0 and out.startswith("The model continues your text; it was not taught to follow instructions")
    assert chat_lines(out) == [*replies, "(taken back)", replies[2], ""]


def test_what_is_piped_into_a_chat_is_read_as_every_file_of_lines(run_folder, dsv4_run):
    """The console's encoding, a byte-order mark and U+2028 used to change what was said."""
    plain = dsv4_run("chat", run_folder, *OPTIONS, typed="é a\u2028b\n/undo\n")[1]
    marked = dsv4_run("chat", run_folder, *OPTIONS, typed=b"\xef\xbb\xbf" + "é a\u2028b\r\n/undo\r\n".encode())[1]
    engine = Engine.open(run_folder)
    reply = engine.generate([[0, *(b + 2 for b in "é a\u2028b".encode())]], SamplingParams(**GREEDY))[0].text
    assert chat_lines(plain) == chat_lines(marked) == [reply, "(taken back)", ""]
    code, _, err = dsv4_run("chat", run_folder, *OPTIONS, typed=b"caf\xe9\n")
    assert code == 2 and "line 1 of stdin is not UTF-8" in err


def test_chat_reset_and_what_it_does_not_know(run_folder, dsv4_run):
    typed = "/undo\nIt was\n/reset\n/undo\nIt was\n/what now\n" + "x" * 300 + "\n"
    code, out, _ = dsv4_run("chat", run_folder, *OPTIONS, typed=typed)  # ends with the input
    lines = chat_lines(out)
    assert code == 0 and lines[0] == lines[3] == "(there is nothing to take back)"
    assert lines[1] == lines[4] and lines[5] == "(there is no /what: use /undo, /reset or /quit)"
    assert "max_position_embeddings=300; shorten" in lines[6]


def test_ctrl_c_stops_a_reply_and_the_chat_goes_on(run_folder, dsv4_run, monkeypatch):
    """The interrupted reply is part of the text; taking it back gives the text before it."""
    from dsv4.engine.runner import Runner

    run, calls = Runner.run, []

    def stopping(self, work):
        calls.append(work)
        if len(calls) == 12:  # the fourth token of the second reply
            run(self, work)
            raise KeyboardInterrupt
        return run(self, work)

    monkeypatch.setattr(Runner, "run", stopping)
    code, out, _ = dsv4_run("chat", run_folder, *OPTIONS, typed="It was\nThen\n/undo\nThen\n/quit\n")
    lines = chat_lines(out)
    assert code == 0 and lines[1].endswith(" (stopped)") and lines[2] == "(taken back)"
    assert lines[3].startswith(lines[1].removesuffix(" (stopped)")) and len(lines[3]) > 4


def test_a_text_that_is_interrupted_while_it_is_read_is_read_on(run_folder, dsv4_run, monkeypatch):
    from dsv4.cli import common
    from dsv4.engine.runner import Runner

    run, opened, text = Runner.run, common.open_engine, "It was a dark and stormy night. " * 4
    monkeypatch.setattr(common, "open_engine", lambda *given, **more: opened(*given, **more, tokens_per_step=50))
    _, out, _ = dsv4_run("chat", run_folder, *OPTIONS, typed=f"{text}\n")
    want, calls = chat_lines(out)[0], []

    def interrupted(self, shares):
        calls.append(shares)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return run(self, shares)

    monkeypatch.setattr(Runner, "run", interrupted)
    code, out, _ = dsv4_run("chat", run_folder, *OPTIONS, typed=f"{text}\n\n/undo\n/undo\n/undo\n")
    lines = chat_lines(out)
    assert code == 0 and lines[0].startswith("(stopped after reading 50 of ") and "an empty line reads on" in lines[0]
    assert lines[1:5] == [want, "(taken back)", "(taken back)", "(there is nothing to take back)"]


def test_ctrl_c_ends_generate_with_one_sentence(run_folder, dsv4_run, monkeypatch):
    from dsv4.engine.runner import Runner

    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, shares: (signal.raise_signal(signal.SIGINT), run(self, shares))[1])
    code, _, err = dsv4_run("generate", run_folder, "It was", "--max-tokens", "3")
    assert code == 1 and "stopped; what was read is not kept: `dsv4 chat` goes on" in err and "Traceback" not in err


def test_chat_needs_a_model(dsv4_run):
    code, _, err = dsv4_run("chat", "nowhere")
    assert code == 2 and "nowhere does not exist" in err
