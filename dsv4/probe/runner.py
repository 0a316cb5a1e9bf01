"""Runs probes and keeps what they find: every record is appended as it comes, and a run that was stopped goes on.

A folder holds run.json (which model, which settings), records.jsonl and the report. A probe that came to its end leaves
a line that says so, also where it found that it has nothing to measure: the same model and settings would say that
once more, if the text is the same one, which nobody checks. One that was stopped half way or failed is asked again, and
what it had left is taken out first; so is one that does not apply to the model, which costs nothing.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsv4 import files
from dsv4.errors import UserError, shown
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject
from dsv4.probe.table import Probe

RUN, RECORDS = "run.json", "records.jsonl"
Show = Callable[[str, int, int, Record | None], None]  # probe, probes done, probes in all, its newest record


def run(subject: Subject, probes: Sequence[Probe], settings: Settings, out: Path, show: Show) -> list[Record]:
    """Run what is not done yet and return all records of the folder. UserError for a folder of another run.

    A probe that breaks down leaves a record that says so, and the others run all the same; Ctrl-C ends the run, and
    the next one goes on with the probe that it ended in.
    """
    files.make_folder(out)
    lock = files.FolderLock(out)
    try:
        _same_run(subject, settings, out)
        kept, finished = _kept(out / RECORDS)
        _rewrite(out / RECORDS, kept, finished)
        records = [r for r in kept if r.probe in finished]
        for number, probe in enumerate(probes):
            show(probe.name, number, len(probes), None)
            if probe.name in finished:
                continue
            for record in _of(probe, subject, settings):
                _append(out / RECORDS, record.to_json())
                records.append(record)
                show(probe.name, number, len(probes), record)
            ended = all(r.status != "failed" for r in records if r.probe == probe.name)
            if ended and probe.needs(subject.config) is None:
                _append(out / RECORDS, {"finished": probe.name})
        return records
    finally:
        lock.release()


def read(out: Path) -> tuple[dict[str, Any], list[Record]]:
    """What a folder's run was, and its records; UserError if it holds none."""
    about = files.read_json(out / RUN, "the description of a probe run", "give a folder that dsv4 probe --out has made")
    return about, _kept(out / RECORDS)[0]


def _of(probe: Probe, subject: Subject, settings: Settings) -> Iterator[Record]:
    """A probe's records; at least one, whatever happens but Ctrl-C."""
    recorder = Recorder(probe.name, subject, settings)
    why = probe.needs(subject.config)
    if why is not None:
        yield recorder.absent("skipped", why)
        return
    torch.manual_seed(settings.seed)  # what a probe draws comes from its settings; this is for what it calls
    any_record = False
    try:
        for record in probe.run(subject, settings):
            assert record.probe == probe.name, f"{probe.name} made a record of {record.probe}"
            any_record = True
            yield record
        assert any_record, f"{probe.name} made no record"
    except Exception as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        line = f", {Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else ""
        reason = " ".join(str(error).split())[:300] or "no reason given"
        yield recorder.absent("failed", f"{type(error).__name__}{line}: {reason}")


# --- the folder ------------------------------------------------------------------------------------------------------


def _same_run(subject: Subject, settings: Settings, out: Path) -> None:
    about = {
        "model": subject.name, "fingerprint": subject.fingerprint, "config_hash": subject.config_hash,
        "dtype": subject.dtype, "text": subject.reads_text, "settings": asdict(settings),
        "config": subject.config.to_json(),
    }  # fmt: skip
    about = json.loads(json.dumps(about))
    if not (out / RUN).exists():
        files.write_json(out / RUN, about)
        return
    before = files.read_json(out / RUN, "the description of a probe run", "remove the folder, or give another --out")
    for key in ("fingerprint", "dtype", "settings"):
        if before.get(key) != about[key]:
            raise UserError(
                f"{out} holds a run with {key}={shown(before.get(key))}, and this one has {shown(about[key])}: "
                "give another --out"
            )


def _kept(path: Path) -> tuple[list[Record], set[str]]:
    """The records of a file, and the probes that came to their end. A last line that a crash cut short is left out."""
    if not path.exists():
        return [], set()
    text = files.read_text(path, "the records", "remove the folder and run the probes again")
    whole, _, _ = text.rpartition("\n")
    records, finished = [], set()
    for line in whole.splitlines():
        data = files.parse_json(line, f"a line of {path}", "remove that line: its probe is run again")
        if "finished" in data:
            finished.add(data["finished"])
        else:
            records.append(Record.from_json(data))
    return records, finished


def _rewrite(path: Path, records: Sequence[Record], finished: set[str]) -> None:
    """Leave the records of finished probes alone in the file."""
    lines = [json.dumps(r.to_json()) for r in records if r.probe in finished]
    lines += [json.dumps({"finished": name}) for name in dict.fromkeys(r.probe for r in records) if name in finished]
    files.write_text(path, "".join(f"{line}\n" for line in lines))


def _append(path: Path, data: dict[str, Any]) -> None:
    with files.explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(data, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
