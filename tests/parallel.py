"""One process of a run that several share: what test_parallel.py starts some of.

`python parallel.py RANK PROCESSES MEETING_FILE JOBS.json` trains each job, a dict of `out`, `settings` (overrides of
`recipe()`) and what else `work` reads, one after the other, and prints a JSON object of what came of each.
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from choices import Recorder

from dsv4.config import ModelConfig
from dsv4.settings import merge, read_overrides
from dsv4.train.dataconfig import DataConfig
from dsv4.train.optim import is_sharded, whole
from dsv4.train.parallel.processes import Joined, Processes
from dsv4.train.runconfig import IndexerConfig, LossConfig, OptimConfig, RunConfig, SaveConfig, ScheduleConfig
from dsv4.train.trainer import Trainer


def recipe(text: Path) -> RunConfig:
    """A layer of every kind, on single bytes: hash and learned gates, window, CSA that chooses, HCA, MTP. Rows of 320
    tokens cut anywhere hold documents of all sizes; the three phases of the indexers are gone through. With few index
    heads scores are often exactly 0, and more ties come out otherwise (docs/scale.md)."""
    model = ModelConfig.preset(
        "tiny", vocab_size=258, hidden_size=48, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0),
        num_attention_heads=2, head_dim=32, qk_rope_head_dim=8, q_lora_rank=24, o_lora_rank=24, sliding_window=24,
        index_n_heads=32, index_head_dim=16, index_topk=8, moe_intermediate_size=32, num_hash_layers=1,
    )  # fmt: skip
    return RunConfig(
        model=model,
        data=DataConfig(path=str(text), tokenizer="bytes", seq_len=320, tokens_per_step=1280),
        optim=OptimConfig(lr=2e-3),
        loss=LossConfig(balance=1e-2, bias_speed=1e-2),
        schedule=ScheduleConfig(steps=3, warmup=1, decay_fraction=0.5),
        indexer=IndexerConfig(train=True, dense=1, warmup=1),
        save=SaveConfig(every=1000, eval_every=1000, eval_tokens=600),
    )


def settings(text: Path, changes: list[str]) -> RunConfig:
    config = recipe(text)
    return merge(config, read_overrides(config, changes))


def work(job: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """Train a job; returns what the log says, digests of the whole state by step (that at which it began, and those in
    `digests`), and how many weights this process holds. stop_after: the step after which the first process is asked to
    stop, which the others are to learn of. choices: whether what is chosen is kept beside the log (choices.py). spoil:
    by step the factor of a loss, unless experts are chosen ahead then."""
    config = settings(Path(job["text"]), job["settings"])
    trainer = Trainer(config, Path(job["out"]), resume=job.get("resume", ""), processes=processes)
    recorder = Recorder(trainer) if job.get("choices") else None
    spoil(trainer, {int(step): factor for step, factor in job.get("spoil", {}).items()})
    records: list[dict[str, Any]] = []
    digests = {trainer.progress.step: state_digest(trainer)}

    def report(record: dict[str, Any]) -> None:
        records.append(record)
        if record["step"] in job.get("digests", ()):
            digests[record["step"]] = state_digest(trainer)
        trainer.stop.asked = int(record["step"] == job.get("stop_after") and processes.is_first)

    trainer.run(report)
    if recorder is not None:
        recorder.write(trainer.folder.path)
    held = sum((p.to_local() if is_sharded(p) else p).numel() for p in trainer.model.parameters())  # type: ignore[attr-defined]
    return {"records": records, "digests": digests, "held": held}


def spoil(trainer: Trainer, steps: dict[int, float]) -> None:
    """Let the loss of an update that is to come after so many be a multiple of what it is."""
    plain = trainer._gradient

    def gradient(step, weight, chosen=None):
        parts = plain(step, weight, chosen)
        if step in steps and chosen is None:
            parts = [replace(part, next_token=part.next_token * steps[step]) for part in parts]
        return parts

    trainer._gradient = gradient  # type: ignore[method-assign]


def state_digest(trainer: Trainer) -> str:
    """sha256 of all weights, buffers and momenta, whole, with the step."""
    digest = hashlib.sha256(str(trainer.progress.step).encode())
    for name, tensor in sorted((trainer.model.state_dict() | trainer.optimizer.state_dict()).items()):
        digest.update(name.encode() + whole(tensor).detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    rank, world, meeting, jobs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    done = {}
    for job in json.loads(jobs.read_text()):
        config = settings(Path(job["text"]), job["settings"])
        done[job["name"]] = work(job, Joined(config.parallel, torch.device("cpu")))
    print(json.dumps(done), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads abort at times when the interpreter ends


if __name__ == "__main__":
    main()
