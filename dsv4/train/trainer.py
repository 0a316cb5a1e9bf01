"""The training loop: batch -> loss -> backward -> clip -> step -> balance bias -> log; evaluate and save now and then.

A run lives in a folder: config.yaml (resolved), log.jsonl, data/, checkpoints/. What the loop shows while it works is
left to the caller, who gets every record. Ctrl-C or SIGTERM end the run after the current step, with a checkpoint.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from dsv4.checkpoint import write_atomically
from dsv4.errors import UserError
from dsv4.model import Transformer
from dsv4.text import Tokenizer
from dsv4.train.data import Batches, Packed, heldout_batches
from dsv4.train.log import Log
from dsv4.train.loss import Loss, heldout_nll, training_loss, update_balance_bias
from dsv4.train.optim import HybridOptimizer, clip_gradients, parameter_groups
from dsv4.train.recipes import RunConfig
from dsv4.train.rundata import prepare_data
from dsv4.train.schedule import decay_steps, lr_scale, mtp_weight
from dsv4.train.state import Progress, latest, load_state, save_state

Record = dict[str, Any]


class Trainer:
    """One run. `Trainer(config, folder).run(report)`; `report` gets every log record as it is written.

    resume: "" (the folder must hold no run yet), "auto" (go on if it holds one) or the path of a checkpoint. Master
    weights are fp32; `dtype` is that of the computation.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        resume: str = "",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.folder = config, folder
        checkpoint = _resume_point(folder, resume)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer: Tokenizer
        self.train_data: Packed
        self.heldout: Packed
        self.tokenizer, self.train_data, self.heldout = prepare_data(config, folder)
        torch.manual_seed(config.seed)
        self.model = Transformer(config.model, recompute=config.recompute).to(device)
        self.model.dtype = dtype
        groups = parameter_groups(self.model.named_parameters(), config.model, weight_decay=config.optim.weight_decay)
        self.optimizer = HybridOptimizer(groups, config.optim.lr, momentum=config.optim.momentum, ns=config.optim.ns)
        self.progress = Progress()
        if checkpoint is not None:
            self.progress = load_state(checkpoint, self.model, self.optimizer, config.to_dict())
        micro = config.data.tokens_per_step // config.data.micro_batches
        self.batches = Batches(self.train_data, micro, seed=config.seed, seq_len=config.data.seq_len)
        self.saved_step = self.progress.step if checkpoint is not None else -1
        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        write_atomically(folder / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
        self.log = Log(folder, self.progress.step)

    def run(self, report: Callable[[Record], None] = lambda record: None) -> bool:
        """Train to the end of the schedule; True when it was reached, False when a signal stopped the run."""
        steps, save = self.config.schedule.steps, self.config.save
        with _stop_signals() as stopped:
            while self.progress.step < steps and not stopped():
                record = self.step()
                at_end = self.progress.step == steps
                if self.progress.step % save.eval_every == 0 or at_end:
                    record["heldout_bpb"] = self.evaluate()
                if self.progress.step % save.every == 0 or at_end:
                    self.save()
                self.log.write(record)
                report(record)
            if self.saved_step != self.progress.step:
                self.save()
        return self.progress.step == steps

    def step(self) -> Record:
        """One update; returns its log record."""
        config, step, began = self.config, self.progress.step, time.perf_counter()
        s = config.schedule
        course = (step, s.steps, s.warmup, decay_steps(s.steps, s.decay_fraction))
        self.optimizer.set_lr(config.optim.lr * lr_scale(*course, s.final))
        weight = mtp_weight(*course, before=config.loss.mtp, after=config.loss.mtp_in_decay)
        self.optimizer.zero_grad(set_to_none=True)
        micro = config.data.micro_batches
        parts: list[Loss] = []
        for i in range(micro):
            batch = self.batches.batch(step * micro + i)
            part = training_loss(
                self.model, batch.ids, batch.targets, batch.lengths,
                mtp_weight=weight, balance_weight=config.loss.balance,
            )  # fmt: skip
            (part.total / micro).backward()
            parts.append(part)
        norm = clip_gradients(self.model.parameters(), config.optim.clip)
        loss = sum(p.next_token for p in parts) / micro
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise FloatingPointError(
                f"step {step + 1} has loss {loss} and gradient norm {norm}; the last good state is the newest "
                f"checkpoint in {self.folder}: lower optim.lr or optim.clip and resume"
            )
        self.optimizer.step()
        loads: dict[int, torch.Tensor] = {}
        for layer, load in (item for part in parts for item in part.loads.items()):
            loads[layer] = loads.get(layer, 0) + load
        update_balance_bias(self.model, loads, config.loss.bias_speed)
        seconds = time.perf_counter() - began
        self.progress.step += 1
        self.progress.tokens += config.data.tokens_per_step
        self.progress.seconds += seconds
        return {
            "step": step + 1,
            "loss": loss,
            "mtp_loss": sum(p.mtp for p in parts) / micro,
            "balance": sum(p.balance for p in parts) / micro / max(1, len(loads)),
            "load_max": max((float(load.max() / load.mean()) for load in loads.values()), default=1.0),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "tokens": self.progress.tokens,
            "tokens_per_second": config.data.tokens_per_step / seconds,
        }

    def evaluate(self) -> float:
        """Held-out bits per byte over `save.eval_tokens` tokens."""
        save, data = self.config.save, self.config.data
        nats, count = 0.0, 0
        for batch in heldout_batches(
            self.heldout, data.tokens_per_step // data.micro_batches, data.seq_len, save.eval_tokens
        ):
            nats += heldout_nll(self.model, batch.ids, batch.targets, batch.lengths)
            count += batch.num_bytes
        return nats / math.log(2) / count

    def save(self) -> Path:
        """Write a checkpoint of the state after the last update."""
        self.saved_step = self.progress.step
        return save_state(
            self.folder, self.model, self.optimizer, self.tokenizer, self.progress, self.config.to_dict(),
            self.config.save.keep,
        )  # fmt: skip


def _resume_point(folder: Path, resume: str) -> Path | None:
    """Which checkpoint to go on from; UserError rather than writing over a run."""
    if resume not in ("", "auto"):
        path = Path(resume)
        if not path.is_dir():
            raise UserError(f"there is no checkpoint {path}: resume from a folder such as RUN/checkpoints/step-000100")
        return path
    found = latest(folder)
    if found is not None and not resume:
        raise UserError(f"{folder} already holds a run ({found.name}): add --resume auto, or choose another --out")
    return found


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGINT or SIGTERM only sets a flag; a second one interrupts as usual."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        restore()
