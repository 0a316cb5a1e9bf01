"""Failures caught here: a token learned that the model is not to write, or one not learned that it is; an answer
learned behind another prompt than the one it will stand behind; conversations that reach into each other or are cut;
a row that the format cannot say ends in a traceback, or leaves something behind; fine-tuning that does not begin with
the weights it was given.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conversations import conversation, v4_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4 import ModelConfig, Transformer, UserError, ops
from dsv4.checkpoint import RunFolder
from dsv4.cli import main
from dsv4.model.head import IGNORE
from dsv4.settings import merge
from dsv4.text import load_tokenizer, render, train_bpe
from dsv4.text.lessons import lessons_of
from dsv4.text.prompt import CONTROLS
from dsv4.train.batches import Batch, Batches, heldout_batches
from dsv4.train.bits import BitWriter, num_bytes_of, read_bits
from dsv4.train.encode import Encoder
from dsv4.train.loss import training_loss
from dsv4.train.packed import Packed, prepare
from dsv4.train.recipes import RECIPES, resolve
from dsv4.train.runconfig import RunConfig
from dsv4.train.rundata import prepare_data
from dsv4.train.trainer import Trainer

BOS, EOS, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
Row = dict[str, Any]
TOKENIZER = train_bpe(["the whale and the sea, one and two. " * 20], 320, [c.name for c in CONTROLS[2:]])


def user(content: str = "Q", **more: Any) -> Row:
    return {"role": "user", "content": content, **more}


def answer(content: str | None = "A", reasoning: str | None = None, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **({"reasoning_content": reasoning} if reasoning else {}), **more}


def told(row: Row) -> list[list[tuple[str, bool]]]:
    """Each lesson as (text, whether it is learned)."""
    return [[(prompt.text, learned) for prompt, learned in lesson.parts] for lesson in lessons_of(row)]


def learned(row: Row) -> list[list[str]]:
    return [[text for text, written in lesson if written] for lesson in told(row)]


# --- which tokens are learned ---


def test_an_answer_and_its_end_are_learned_and_nothing_else():
    row = {"messages": [{"role": "system", "content": "S"}, user("Q1"), answer("A1"), user("Q2"), answer("A2")]}
    assert told(row) == [
        [
            (f"{BOS}S{U}Q1{A}</think>", False),
            (f"A1{EOS}", True),
            (f"{U}Q2{A}</think>", False),
            (f"A2{EOS}", True),
        ]  # fmt: skip
    ]


def test_reasoning_and_the_token_that_ends_it_are_learned():
    assert told({"messages": [user(), answer("A", "R")]}) == [
        [(f"{BOS}{U}Q{A}<think>", False), (f"R</think>A{EOS}", True)]
    ]
    forced = {"messages": [user(), answer("A")], "thinking": True}
    assert learned(forced) == [[f"</think>A{EOS}"]]


def test_reasoning_that_later_prompts_leave_out_is_learned_where_it_stood():
    """The first answer is learned behind </think>, which it never follows, or its reasoning is lost."""
    row = {"messages": [user("Q1"), answer("A1", "R1"), user("Q2"), answer("A2", "R2")]}
    assert told(row) == [
        [(f"{BOS}{U}Q1{A}<think>", False), (f"R1</think>A1{EOS}", True)],
        [(f"{BOS}{U}Q1{A}</think>A1{EOS}{U}Q2{A}<think>", False), (f"R2</think>A2{EOS}", True)],
    ]
    open_end = {"messages": [*row["messages"], user("Q3")]}
    assert told(open_end) == told(row)
    kept = row | {"drop_thinking": False}
    assert learned(kept) == [[f"R1</think>A1{EOS}", f"R2</think>A2{EOS}"]]


def test_calls_are_learned_and_their_results_are_not():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    messages = [user(), answer("", "R1", tool_calls=[call]), {"role": "tool", "content": "one"}, answer("A", "R2")]
    block = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="x" string="false">1'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    (lesson,) = told({"messages": messages, "tools": [tool]})
    assert [text for text, written in lesson if written] == [f"R1</think>{block}{EOS}", f"R2</think>A{EOS}"]
    assert lesson[2] == (f"{U}<tool_result>one</tool_result>{A}<think>", False)
    assert "f" in lesson[0][0] and not lesson[0][1]
    assert "".join(text for text, _ in lesson) == render(messages, thinking=True, tools=[tool]).text


def test_a_task_is_asked_for_and_its_answer_learned_without_thinking():
    assert told({"messages": [user("Q", task="title"), answer("T")]}) == [
        [(f"{BOS}{U}Q<｜title｜>", False), (f"T{EOS}", True)]
    ]


def test_a_turn_left_open_has_no_end():
    assert learned({"messages": [user(), answer("A", wo_eos=True)]}) == [["A"]]


@given(seed=st.integers(0, 10**9), thinking=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_answer_is_learned_behind_the_prompt_it_will_stand_behind(seed: int, thinking: bool):
    """By ids of V4's own vocabulary, for conversations of every shape."""
    messages, tokenizer = conversation(random.Random(seed)), v4_tokenizer()
    if not thinking:
        messages = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    row = {"messages": messages, "thinking": thinking}
    if not answers:
        with pytest.raises(UserError, match="no answer of the assistant"):
            lessons_of(row)
        return
    lessons = [lesson.ids(tokenizer) for lesson in lessons_of(row)]
    assert all(any(bits) for _, bits in lessons)
    for i in answers:
        before = messages[i - 1] if i else {"wo_eos": True}
        if before.get("wo_eos"):  # the answer goes on where another one was left open
            continue
        prompt, said = (render(messages[:end], thinking=thinking) for end in (i, i + 1))
        ids = prompt.ids(tokenizer)
        assert said.text.startswith(prompt.text)
        rest = said.text[len(prompt.text) :]
        behind = [(tokens[len(ids) :], bits[len(ids) :]) for tokens, bits in lessons if tokens[: len(ids)] == ids]
        found = [bits[0] and tokenizer.decode(tokens, skip_special=False).startswith(rest) for tokens, bits in behind]
        assert sum(found) == 1 if rest else True  # once: an answer in two lessons would weigh twice
        if before["role"] in ("system", "latest_reminder"):
            break  # no token stands between the two texts, so that later prompts tokenise them as one


@given(lengths=st.lists(st.integers(0, 40), max_size=8), seed=st.integers(0, 99))
def test_bits_are_read_back_wherever_they_lie(lengths: list[int], seed: int):
    rng, written = random.Random(seed), bytearray()
    arrays = [torch.tensor([rng.random() < 0.5 for _ in range(n)], dtype=torch.bool).numpy() for n in lengths]
    writer = BitWriter(lambda packed: written.extend(packed.tobytes()))
    for array in arrays:
        writer.write(array)
    writer.close()
    bits = [bool(bit) for array in arrays for bit in array]
    assert len(written) == num_bytes_of(len(bits))
    packed = torch.tensor(list(written), dtype=torch.uint8).numpy()
    for first in range(0, len(bits) + 1, 3):
        for end in range(first, len(bits) + 1, 5):
            assert read_bits(packed, first, end).tolist() == bits[first:end]


# --- packed conversations ---


def rows_of(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = rng.randrange(9), rng.randrange(9)
        turns = [user(f"{a} and {b}"), answer(f"the {a} {b}", "one" if rng.random() < 0.3 else None)]
        rows.append({"messages": turns + [user("two"), answer("sea")] * rng.randrange(3)})
    return rows


def packed_rows(folder: Path, rows: list[Row]) -> Packed:
    documents = [json.dumps(row) for row in rows]
    return prepare(documents, TOKENIZER, folder, split_name="train", encoder=Encoder(TOKENIZER, "chat"))


def expected(rows: list[Row]) -> dict[tuple[int, ...], list[bool]]:
    lessons = [lesson.ids(TOKENIZER) for row in rows for lesson in lessons_of(row)]
    return {tuple(ids): bits for ids, bits in lessons}


def check_whole(batch: Batch, lessons: dict[tuple[int, ...], list[bool]]) -> list[tuple[int, ...]]:
    """Every segment is one whole lesson, and its targets are the learned tokens; returns the segments."""
    at, found = 0, []
    for length in batch.lengths:
        ids = tuple(batch.ids[at : at + length].tolist())
        bits = lessons[ids]
        right = [token if bit else IGNORE for token, bit in zip(ids[1:], bits[1:], strict=True)] + [IGNORE]
        assert batch.targets[at : at + length].tolist() == right
        found.append(ids)
        at += length
    size = torch.tensor(TOKENIZER.token_bytes())
    assert batch.num_bytes == int(size[batch.targets[batch.targets != IGNORE]].sum())
    return found


def test_conversations_are_packed_whole_and_each_once(tmp_path: Path):
    rows = rows_of(150)
    packed, lessons = packed_rows(tmp_path, rows), expected(rows)
    batches, seen = Batches(packed, 100, seed=1, seq_len=60, whole=True), []
    while len(seen) < 2 * packed.num_documents:
        batch = next(batches)
        seen += check_whole(batch, lessons)
        assert 60 < len(batch.ids) < 140 and len(batch.ids) == batches.num_tokens(batches.step - 1)
    every = sorted(ids for row in rows for lesson in lessons_of(row) for ids in [tuple(lesson.ids(TOKENIZER)[0])])
    assert set(seen) == set(every)
    assert packed.num_learned == sum(sum(bits) for row in rows for lesson in lessons_of(row)
                                     for bits in [lesson.ids(TOKENIZER)[1]])  # fmt: skip
    again = Batches(packed, 100, seed=1, seq_len=60, whole=True)
    for step in (70, 3, 64, 63, 0):
        assert torch.equal(again.batch(step).ids, Batches(packed, 100, 1, 60, whole=True).batch(step).ids)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_whole_pieces_of_many_blocks_are_each_there_as_often_as_epochs_say(tmp_path_factory, lengths, seed: int):
    """A piece at the border of two blocks is lost, or is in both."""
    rows = [{"messages": [user("two " * n), answer("sea")]} for n in lengths]
    packed = packed_rows(tmp_path_factory.mktemp("whole"), rows)
    batches = Batches(packed, 40, seed, 20, whole=True)
    counts: dict[tuple[int, ...], int] = {}
    for step in range(192):  # three blocks
        batch, at = batches.batch(step), 0
        for length in batch.lengths:
            ids = tuple(batch.ids[at : at + length].tolist())
            counts[ids] = counts.get(ids, 0) + 1
            at += length
    epochs = 192 * 40 / packed.num_tokens
    first, end, _ = packed.pieces(20)
    pieces = [tuple(packed.tokens[a:b].tolist()) for a, b in zip(first, end, strict=True)]
    assert set(counts) <= set(pieces)
    for piece in set(pieces):
        times = pieces.count(piece)
        assert int(epochs) * times <= counts.get(piece, 0) <= (int(epochs) + 1) * times


def test_evaluation_cuts_no_conversation(tmp_path: Path):
    rows = rows_of(40)
    packed, lessons = packed_rows(tmp_path, rows), expected(rows)
    seen = [ids for batch in heldout_batches(packed, 90, 60, whole=True) for ids in check_whole(batch, lessons)]
    assert len(seen) == packed.num_documents


def test_a_changed_mask_is_noticed(tmp_path: Path):
    packed = packed_rows(tmp_path, rows_of(5))
    file = packed.folder / "train.mask"
    raw = bytearray(file.read_bytes())
    raw[1] ^= 4
    file.write_bytes(raw)
    with pytest.raises(UserError, match="train.mask has changed since it was written"):
        Packed.open(tmp_path, "train")


# --- what is learned from them ---


def gradients(model: Transformer, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    training_loss(model, batch.ids, batch.targets, batch.lengths, mtp_weight=0.5, balance_weight=0.0).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_targets_of_tokens_that_are_not_learned_move_nothing(tmp_path: Path):
    """What stands last and is not learned is only ever a target: another one there leaves the gradient as it is.

    By the plain ops, which sum the tokens of an expert one way whoever else is there.
    """
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("tiny", vocab_size=320, initializer_range=0.1))
    found = []
    for n, last in enumerate("123"):
        row = {"messages": [user("the whale"), answer("and the sea"), user(last)]}
        packed = packed_rows(tmp_path / str(n), [row])
        found.append(next(iter(heldout_batches(packed, 1000, 1000))))
    first = found[0]
    assert len({len(batch.ids) for batch in found}) == 1 and len({tuple(b.ids.tolist()) for b in found}) == 3
    with ops.using("blocked"):
        right, *same = (gradients(model, batch) for batch in found)
    assert any(gradient.abs().max() > 0 for gradient in right.values())
    for found_there in same:
        for name, gradient in found_there.items():
            torch.testing.assert_close(
                gradient, right[name], rtol=1e-4, atol=1e-5 * float(right[name].abs().max()) + 1e-7
            )
    seen = replace(first, targets=torch.where(first.targets == IGNORE, first.ids.roll(-1), first.targets))
    assert not torch.allclose(gradients(model, seen)["embed.weight"], right["embed.weight"], rtol=1e-3)


def chats(folder: Path, rows: list[Row], name: str = "chats.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def config_for(path: Path, steps: int = 4, **data: Any) -> RunConfig:
    model = ModelConfig.preset(
        "tiny", vocab_size=320, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), hidden_size=32
    )
    changes = {
        "data": {"path": str(path), "format": "chat", "seq_len": 64, "tokens_per_step": 256, **data},
        "schedule": {"steps": steps, "warmup": 1},
        "save": {"every": 2, "eval_every": 20, "eval_tokens": 500, "keep": 3},
    }
    return merge(replace(RECIPES["tiny"](), model=model), changes)


def test_fine_tuning_from_a_base_model_lowers_the_loss_on_answers(tmp_path: Path):
    """Weights, model and tokenizer are those of the base; the optimiser and the step are new."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "the sea and the whale " * 9}) + "\n" for _ in range(30)))
    base = Trainer(config_for(text, format="text", controls=True), tmp_path / "base")
    base.run()
    path = chats(tmp_path / "chats", rows_of(80))
    overrides = [
        "data.seq_len=64",
        "data.tokens_per_step=256",
        "schedule.steps=16",
        "optim.lr=5e-3",
        "schedule.warmup=1",
    ]
    config = resolve("sft", overrides=overrides, data=str(path), start_from=str(tmp_path / "base"))
    assert config.model == base.config.model
    run = Trainer(config, tmp_path / "sft")
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], tensor), name
    assert run.progress.step == 0 and run.tokenizer.fingerprint() == base.tokenizer.fingerprint()
    before = run.evaluate()
    records: list[dict[str, Any]] = []
    run.run(records.append)
    assert run.evaluate() < 0.7 * before
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    latest = RunFolder(tmp_path / "sft").latest()
    assert latest is not None and load_tokenizer(latest).fingerprint() == run.tokenizer.fingerprint()


def test_a_resumed_fine_tuning_does_not_need_what_it_began_with(tmp_path: Path):
    path = chats(tmp_path / "chats", rows_of(60))
    base = Trainer(config_for(path), tmp_path / "base")
    base.run()
    config = replace(config_for(path, steps=4), start_from=str(RunFolder(tmp_path / "base").latest()))
    whole = Trainer(config, tmp_path / "whole")
    whole.run()
    part = Trainer(config, tmp_path / "part")
    part.run(lambda record: part.stop.__setattr__("asked", True) if record["step"] == 1 else None)
    (tmp_path / "base").rename(tmp_path / "gone")
    resumed = Trainer(config, tmp_path / "part", resume="auto")
    resumed.run()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


# --- rows that cannot be said ---

FINE = json.dumps({"messages": [user(), answer()]})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [{"role": "user"', "line 2 of .*a.jsonl is not valid JSON"),
        ('{"text": "x"}', "line 2 of .*a.jsonl lacks the field 'messages' .it has text.*data.format=text"),
        ('{"messages": "x"}', "line 2 of .*a.jsonl cannot be said in the chat format: its messages are 'x'"),
        ('{"messages": []}', "line 2 of .* give a list of at least one message"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2 of .*: it has no answer of the assistant"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "line 2 of .* message 1 has the role 'bot'"),
        ('{"messages": [3]}', "line 2 of .* message 1 is 3"),
        (json.dumps({"messages": [user(), answer(name_=1)]}), "line 2 of .* has 'name_', which would be lost"),
        (json.dumps({"messages": [user(), answer("A", "R")], "thinking": False}), "which thinking=false would lose"),
        (json.dumps({"messages": [user(), answer()], "tools": "f"}), "line 2 of .*: its tools is 'f'"),
        (json.dumps({"messages": [user(), answer()], "effort": "most"}), "has no effort 'most'"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant"}]}', "half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_said_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, says: str
):
    file = tmp_path / "a.jsonl"
    file.write_text(f"{FINE}\n{line}\n{FINE}\n")
    arguments = ["train", "--recipe", "tiny", "--data", str(file), "--out", str(tmp_path / "run"), "data.format=chat"]
    monkeypatch.setattr("sys.argv", ["dsv4", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    with pytest.raises(UserError, match=says):
        raise UserError(" ".join(error.split()))
    assert not (tmp_path / "run" / "data").exists()
    file.write_text(f"{FINE}\n{FINE}\n")
    prepare_data(config_for(file), tmp_path / "run")  # the mended file can be used in the same place


def test_a_table_of_conversations_is_read_as_its_lines_are(tmp_path: Path):
    rows = rows_of(30)
    chats(tmp_path / "lines", rows)
    (tmp_path / "table").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table" / "chats.parquet")
    found = []
    for folder in ("lines", "table"):
        run = Trainer(config_for(tmp_path / folder), tmp_path / f"run-{folder}")
        run.close()
        assert isinstance(run.train_data, Packed)
        found.append((run.train_data.tokens.tolist(), run.train_data.facts["mask_sha256"]))
    assert found[0] == found[1]
    other = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), other)
    with pytest.raises(UserError, match="other.parquet lacks the column 'messages' .it has text"):
        Trainer(config_for(other), tmp_path / "run-other")


def test_chat_needs_conversations_and_control_tokens(tmp_path: Path):
    (tmp_path / "a.txt").write_text("plain text")
    with pytest.raises(UserError, match="a.txt is plain text, not rows of messages"):
        Trainer(config_for(tmp_path / "a.txt"), tmp_path / "run")
    with pytest.raises(UserError, match="data.format=chat needs conversations"):
        Trainer(merge(config_for(tmp_path), {"data": {"path": ""}}), tmp_path / "run")
    path = chats(tmp_path / "chats", rows_of(3))
    with pytest.raises(UserError, match="data.tokenizer=bytes has no control tokens, which the chat format needs"):
        config_for(path, tokenizer="bytes")
    train_bpe(["the sea " * 9], 280).save(tmp_path / "plain")
    with pytest.raises(UserError, match="lacks <｜User｜>, which the chat format needs.*data.controls=true"):
        Trainer(config_for(path, tokenizer=str(tmp_path / "plain")), tmp_path / "run")
    with pytest.raises(UserError, match="no text can be held out of .*, as it has one conversation"):
        Trainer(config_for(chats(tmp_path / "one", rows_of(1))), tmp_path / "run")


def test_conversations_longer_than_a_sequence_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [{"messages": [user("two " * n), answer("sea")]} for n in (1, 40, 80, 2, 3)]
    Trainer(config_for(chats(tmp_path / "chats", rows), seq_len=32), tmp_path / "run").close()
    assert "2 conversations are longer than data.seq_len=32" in caplog.text
