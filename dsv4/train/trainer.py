"""The training loop: batch -> loss -> backward -> clip -> step -> balance bias -> log; evaluate and save now and then.

A run lives in a folder: config.yaml (resolved), log.jsonl, data/, checkpoints/; one process at a time works in it. What
the loop shows while it works is left to the caller, who gets every record. Ctrl-C or SIGTERM end the run after the
current step, a second one gives that step up; either way the newest whole state is saved (stop.py).
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsv4 import controls
from dsv4.checkpoint import RunFolder
from dsv4.checkpoint import load as load_model
from dsv4.errors import UserError, shown
from dsv4.files import FolderLock, make_folder, remove_leftovers, write_text
from dsv4.model import LanguageModel
from dsv4.model.segments import IndexPhase
from dsv4.settings import write_yaml
from dsv4.text import Tokenizer
from dsv4.train.anticipate import Anticipation, Choices, Spikes, choose, parted, routed
from dsv4.train.balance import learned_gates, update_balance_bias
from dsv4.train.batches import Batches, heldout_batches
from dsv4.train.figures import LOOKED_AT, Peak, look_inside, update_figures
from dsv4.train.indexer import index_figures, is_index_parameter, thaw
from dsv4.train.log import Log, LossWatch
from dsv4.train.loss import Loss, count_totals, heldout_nll, training_loss
from dsv4.train.mixture import Mixture
from dsv4.train.optim import HybridOptimizer, clip_gradients, drop_zero_gradients, parameter_groups
from dsv4.train.packed import Packed, is_prepared
from dsv4.train.parallel.processes import Processes
from dsv4.train.parallel.shares import Rows, Share, rows_of
from dsv4.train.plan import check_memory
from dsv4.train.runconfig import RunConfig
from dsv4.train.rundata import absolute, absolute_path, prepare_data
from dsv4.train.schedule import decay_steps, index_phase, lr_scale, mtp_weight, trunk_step
from dsv4.train.state import Progress, copy_weights, load_state, not_finite, save_state
from dsv4.train.stop import GivenUp, Stop

log = logging.getLogger("dsv4")

Record = dict[str, Any]


class NotFinite(FloatingPointError):
    """A run has come to numbers that are none; `good` is the checkpoint to go back to, if there is one."""

    def __init__(self, what: str, good: Path | None):
        self.good = good
        back = f"the last good state is {good}: resume from it" if good else "there is no checkpoint yet: start anew"
        super().__init__(f"{what}; {back} with a lower optim.lr or optim.clip")


class Trainer:
    """One run. `Trainer(config, folder).run(report)`; `report` gets every log record as it is written.

    resume: "" (the folder must hold no run yet), "auto" (go on if it holds one) or the path of a checkpoint. A run that
    is not resumed begins with the weights of config.start_from, if that is given, and with nothing else of it. Master
    weights are fp32; `dtype` is that of the computation. on_progress: told of the preparation of the data. peak:
    measures FLOP/s that the device can do, for the log's MFU. processes: this one and those that share the run
    (parallel/processes.py), each of which makes the same calls.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        resume: str = "",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        on_progress: Callable[[str, int, int | None], None] | None = None,
        peak: Callable[[], float] | None = None,
        processes: Processes | None = None,
    ):
        self.processes = processes = processes or Processes()
        self.folder, self.peak = RunFolder(folder), None if peak is None else Peak(peak, processes.world)
        checkpoint = _resume_point(self.folder, resume)
        begins = absolute_path(config.start_from, "start_from") if config.start_from else ""
        config = replace(config, data=absolute(config.data), start_from=begins)
        started = load_model(begins, config=config.model) if begins and checkpoint is None else None
        check_memory(config, torch.device(device))
        make_folder(folder)
        self.stop = Stop(f"the newest state is saved in {folder}", patient=processes.several)
        self.lock = FolderLock(folder) if processes.is_first else None
        if processes.is_first:
            remove_leftovers(folder)
            remove_leftovers(self.folder.checkpoints)
        self.tokenizer: Tokenizer
        self.train_data: Packed | Mixture
        self.heldout: Packed
        with processes.first_alone():
            prepared = (checkpoint is not None or not processes.is_first) and is_prepared(self.folder.data)
            self.tokenizer, self.train_data, self.heldout = prepare_data(
                config, folder, resuming=prepared, on_progress=on_progress
            )
        self.config = config = _with_tokenizer(config, self.tokenizer)
        torch.manual_seed(config.seed)
        with processes.unmade(config.model):
            model = controls.build(config.model, compute_dtype=dtype, recompute=config.recompute)
        self.model = processes.shard(model) if processes.several else model.to(device)
        if started is not None:
            copy_weights(started, self.model)
        o = config.optim
        groups = parameter_groups(
            self.model.named_parameters(), config.model, weight_decay=o.weight_decay, heads_apart=o.heads_apart
        )
        named = dict(self.model.named_parameters())
        self.indexers = [p for name, p in named.items() if is_index_parameter(name)]
        self.others = [p for name, p in named.items() if not is_index_parameter(name)]
        ns_dtype = torch.bfloat16 if o.newton_schulz_dtype == "bfloat16" else torch.float32
        self.optimizer = HybridOptimizer(groups, o.lr, momentum=o.momentum, ns=o.newton_schulz, ns_dtype=ns_dtype)
        self.batches = Batches(
            self.train_data, config.data.tokens_per_step, seed=config.seed, seq_len=config.data.seq_len,
            whole=config.data.packs_whole, stages=config.data.stages,
        )  # fmt: skip
        if cut := self.batches.num_conversations_cut:
            log.warning(
                "%d conversations are longer than data.seq_len=%d and are cut, their rest learned without what was "
                "before it: raise data.seq_len to have them whole", cut, config.data.seq_len,
            )  # fmt: skip
        self.progress, changed = Progress(), {}
        self.anticipation = self._nothing_ahead()
        if checkpoint is not None:
            changed = self._load(checkpoint)
            if processes.is_first:
                self._go_on_from(checkpoint)
            processes.wait()
        self.saved_step = self.progress.step if checkpoint is not None else -1
        if processes.is_first:
            write_text(self.folder.config, write_yaml(config.to_dict()))
        self._open_log()
        if changed:
            told = {name: [old, new] for name, (old, new) in changed.items()}
            self.log.write({"step": self.progress.step, "event": "resumed", "changed": told})
            log.info("resumed with %s", ", ".join(f"{n}={shown(b)} (was {shown(a)})" for n, (a, b) in changed.items()))

    def _load(self, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
        """Stand where a checkpoint was written; the settings that have changed since."""
        self.anticipation = self._nothing_ahead()
        self.progress, changed = load_state(
            checkpoint, self.model, self.optimizer, self.config.to_dict(), self._data_identity(), self.anticipation
        )
        self.anticipation.until = max(self.anticipation.until, self.progress.anticipatory_until)
        return changed

    def _nothing_ahead(self) -> Anticipation:
        # by what the run is made of and not by the run itself, which would hold itself, and its lock, after a failure
        rows = partial(_chosen_rows, self.model, self.batches, self.processes, self.config.data.micro_batches)
        return Anticipation(self.config.anticipatory, self.config.schedule.steps, self.processes, rows)

    def _open_log(self) -> None:
        """The record up to where the run stands, and those who learn from it."""
        self.log = Log(self.folder.log, self.progress.step, writes=self.processes.is_first)
        self.watch = LossWatch(r["loss"] for r in self.log.records if "loss" in r)
        self.spikes = Spikes(self.config.anticipatory, self.log.records)

    @property
    def finished(self) -> bool:
        """Whether the schedule was completed."""
        return self.progress.step == self.config.schedule.steps

    @property
    def passes(self) -> float:
        """How many times the whole run sees its training tokens; of a mixture, those that it sees most often."""
        return max(self.batches.epochs_at(self.config.schedule.steps).values())

    def run(self, report: Callable[[Record], None] = lambda record: None) -> bool:
        """Train to the end of the schedule; True when it was reached, False when a signal stopped the run.

        NotFinite for a loss, a gradient, a weight or an evaluation that is not a number; FileError when the
        machine does not let something be written. The newest checkpoint is whole then, and of finite numbers.
        """
        steps = self.config.schedule.steps
        if steps < self.progress.step:
            raise UserError(
                f"the run in {self.folder} stands at step {self.progress.step} already: "
                f"schedule.steps={steps} must be at least that"
            )
        try:
            with self.stop:
                self._loop(report)
        finally:
            self.close()
        return self.finished

    def close(self) -> None:
        """Let others work in the folder."""
        if self.lock is not None:
            self.lock.release()

    def _loop(self, report: Callable[[Record], None]) -> None:
        steps, save = self.config.schedule.steps, self.config.save
        if self.config.anticipatory.when == "spike" and self.folder.latest() is None:
            self.save()  # something to go back to
        while self.progress.step < steps and not self.processes.agree(self.stop.asked > 0):
            try:
                record = self.step()
            except GivenUp:
                break
            except NotFinite as error:
                if not self._goes_back(self.progress.step):
                    raise
                self._go_back({"step": self.progress.step + 1, "loss": None, "usual": None}, str(error))
                continue
            usual = self.spikes.judge(record)
            if usual is not None and self._goes_back(record["step"] - 1):
                told = f"step {record['step']}: the loss is {record['loss']:.3f}, where {usual:.3f} is usual"
                self._go_back({"step": record["step"], "loss": record["loss"], "usual": usual}, told)
                continue
            at_end = self.progress.step == steps
            if self.progress.step % save.eval_every == 0 or at_end:
                try:
                    with self.stop.may_give_up():
                        record["heldout_bpb"] = self.evaluate()
                        record |= self.look_inside()
                except GivenUp:
                    pass
            self._watch(record)
            self.log.write(record)  # before the checkpoint: none is ever newer than its line
            if self.progress.step % save.every == 0 or at_end:
                self.save()
            report(record)
        if self.saved_step != self.progress.step:
            self.save()

    def _goes_back(self, step: int) -> bool:
        """Whether a spike in update `step` is answered; while experts are chosen ahead already it is not."""
        return self.config.anticipatory.when == "spike" and not self.anticipation.active(step)

    def _go_back(self, spike: Record, told: str) -> None:
        """To the newest good checkpoint, and on from there with anticipatory routing: until well after the spike, so
        that the next time, if there is one, is later. The checkpoint is written again, and knows of it."""
        good = self.folder.last_good()
        assert good is not None, "one was written before the first update"
        seconds = self.progress.seconds  # which have been spent
        self._load(good)
        self.processes.wait()  # all have found it and read it
        if self.processes.is_first:
            self._go_on_from(good)
        until = spike["step"] + self.config.anticipatory.steps
        self.anticipation.forget(until)
        self.progress.anticipatory_until = self.anticipation.until
        self.progress.spike = {**spike, "back_to": self.progress.step}
        self.progress.seconds = seconds
        self._open_log()
        log.warning(
            "%s; going back to step %d, with anticipatory routing until step %d", told, self.progress.step, until
        )
        self.save()

    def _watch(self, record: Record) -> None:
        """Say so, once, when the loss leaves its own past."""
        was = self.watch.diverging
        if self.watch.push(record["loss"]):
            record["diverging"] = True
            if not was:
                log.warning(
                    "step %d: the loss has risen far above its own past (the mean of the last updates was %.3f); "
                    "the last good checkpoint stays: %s", record["step"], self.watch.lowest, self.folder.last_good(),
                )  # fmt: skip

    def step(self) -> Record:
        """One update; returns its log record. NotFinite, and nothing changed, if a number is not finite."""
        config, step, began = self.config, self.progress.step, self._clock()
        s, i, phase, total = config.schedule, config.indexer, self.phase(step), config.trunk_steps
        course = (trunk_step(step, config.dense_steps, i.warmup), total, s.warmup, decay_steps(total, s.decay_fraction))
        self.optimizer.set_lr(i.lr if phase == "warmup" else config.optim.lr * lr_scale(*course, s.final))
        weight = mtp_weight(*course, before=config.loss.mtp, after=config.loss.mtp_in_decay)
        with self.stop.may_give_up():
            ahead = self._anticipate(step)
            anticipation_seconds = self._clock() - began
            parts = self._gradient(step, weight, None if ahead is None else ahead[1])
            drop_zero_gradients(self.model.parameters())
            # apart, so that no step of the one depends on the gradient of the other
            norm, index_norm = (clip_gradients(ps, config.optim.clip) for ps in (self.others, self.indexers))
        loss = sum(p.next_token for p in parts)
        if not (math.isfinite(norm) and math.isfinite(index_norm) and math.isfinite(loss)):
            raise self._not_finite(f"step {step + 1} has loss {loss} and gradient norms {norm} and {index_norm}")
        before = self._clock()
        self.optimizer.step()
        optimizer_seconds = self._clock() - before
        loads: dict[int, torch.Tensor] = {}
        for layer, load in (item for part in parts for item in part.loads.items()):
            loads[layer] = loads.get(layer, 0) + load
        if phase != "warmup":
            update_balance_bias(self.model, loads, config.loss.bias_speed)
        seconds = self._clock() - began
        batch, device = self.batches.batch(step), self.model.device
        tokens = self.batches.num_tokens(step)
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.seconds += seconds
        return {
            "step": step + 1,
            "loss": loss,
            "mtp_loss": sum(p.mtp for p in parts),
            "balance": sum(p.balance for p in parts) / max(1, len(loads)),
            **update_figures(config.model, batch, loss, loads, seconds, optimizer_seconds, device, self.peak, phase),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            **(index_figures(phase, parts, index_norm) if config.indexer.train else {}),
            "tokens": self.progress.tokens,
            "tokens_per_second": tokens / seconds,
            **self._anticipated(step, ahead, anticipation_seconds / seconds),
            **(self._stage(step) if config.data.stages else {}),
            **({"epochs": self.batches.epochs_at(step + 1)} if config.data.mix else {}),
        }

    def phase(self, step: int) -> IndexPhase:
        """The indexers' phase of update number `step`."""
        i = self.config.indexer
        return index_phase(step, self.config.dense_steps, i.warmup) if i.train else "off"

    def _stage(self, step: int) -> Record:
        """What is in force in update number `step`."""
        course = self.config.data.course
        stage = course.at(step)
        return {"stage": course.number(step), "seq_len": stage.seq_len, "tokens_per_step": stage.tokens_per_step}

    @property
    def _last(self) -> int:
        """The number of the last update, whose phase and lengths an evaluation has; before all of them, the first's."""
        return max(0, self.progress.step - 1)

    def _anticipate(self, step: int) -> tuple[int, Choices] | None:
        """How old the choice of experts for an update is, in updates, and what it is; None where it is not ahead."""
        if not self.anticipation.active(step):
            return None
        return self.anticipation.before(step, lambda n: choose(self.model, self._shares(n), self.phase(n)))

    def _shares(self, step: int) -> list[Share]:
        """What this process computes of an update's batch, part by part."""
        return self.processes.shares(self.batches.batch(step), self.config.data.micro_batches)

    def _anticipated(self, step: int, ahead: tuple[int, Choices] | None, share: float) -> Record:
        """What the log says of it; the first update after a rollback says what spike that was."""
        if ahead is None:
            return {}
        first = self.progress.spike.get("back_to") == step
        return {
            "anticipatory": ahead[0],
            "anticipatory_share": share,
            **({"spike": self.progress.spike} if first else {}),
        }

    def _gradient(self, step: int, mtp: float, chosen: Choices | None = None) -> list[Loss]:
        """Leave the gradient of an update's mean losses in the parameters, however many parts it is computed in."""
        phase = self.phase(step)
        thaw(self.model.named_parameters(), phase)
        self.optimizer.zero_grad(set_to_none=True)
        batch, shares = self.batches.batch(step), self._shares(step)
        totals = count_totals([(batch.targets, batch.lengths)])
        ahead_of = [None] * len(shares) if chosen is None else parted(chosen, shares, len(self.model.layers))
        parts: list[Loss] = []
        for share, ahead in zip(shares, ahead_of, strict=True):
            with routed(self.model, ahead):
                part = training_loss(
                    self.model, share.ids, share.targets, share.segments,
                    mtp_weight=mtp, balance_weight=self.config.loss.balance, totals=totals, phase=phase,
                    index_weight=self.config.indexer.weight,
                )  # fmt: skip
                part.total.backward()
            parts.append(replace(part, total=part.total.detach()))  # its graph is not needed any more
        return self.processes.summed(self.model, parts)

    def evaluate(self) -> float:
        """Held-out bits per byte over `save.eval_tokens` tokens, in sequences as long as the last update's and attended
        as in it; NotFinite if that is not a number."""
        save, data, phase = self.config.save, self.config.data, self.phase(self._last)
        nats, count, stage = 0.0, 0, data.course.at(self._last)
        tokens = max(1, stage.tokens_per_step // data.micro_batches)
        for batch in heldout_batches(self.heldout, tokens, stage.seq_len, save.eval_tokens, whole=data.packs_whole):
            share = self.processes.share(batch)
            nats += heldout_nll(self.model, share.ids, share.targets, share.segments, phase)
            count += batch.num_bytes
        nats = self.processes.total(nats)
        if not math.isfinite(nats):
            raise self._not_finite(f"the evaluation after step {self.progress.step} gives {nats}")
        if not count:
            raise UserError(f"save.eval_tokens={save.eval_tokens} takes only targets that stand for no bytes: raise it")
        return nats / math.log(2) / count

    def look_inside(self) -> Record:
        """Figures of the model that take a pass of their own, on a little of the held-out text."""
        data, phase = self.config.data, self.phase(self._last)
        some = min(LOOKED_AT, self.config.save.eval_tokens)
        held = heldout_batches(self.heldout, some, data.course.at(self._last).seq_len, some, whole=data.packs_whole)
        return look_inside(self.model, next(held), phase)

    def _clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def save(self) -> Path:
        """Write a checkpoint of the state after the last update; never one with a number that is not finite."""
        bad = not_finite(self.model, self.optimizer)
        if self.processes.agree(bool(bad)):
            raise self._not_finite(
                f"{bad or 'what another process has'} holds a number that is not finite after step {self.progress.step}"
            )
        self.log.synchronise()
        path = save_state(
            self.folder, self.model, self.optimizer, self.tokenizer, self.progress, self.config.to_dict(),
            self._data_identity(), keep=self.config.save.keep, diverging=self.watch.diverging,
            anticipation=self.anticipation, processes=self.processes, whole=self.config.save.whole,
        )  # fmt: skip
        self.saved_step = self.progress.step
        return path

    def _not_finite(self, what: str) -> NotFinite:
        return NotFinite(what, self.folder.last_good())

    def _data_identity(self) -> Record:
        """What the order of batches means something for."""
        return {"sha256": self.train_data.facts["sha256"]}

    def _go_on_from(self, checkpoint: Path) -> None:
        """Make the point of resumption the newest state of this run, if it is one of its own."""
        newest = self.folder.latest()
        if newest is None or checkpoint.resolve() == newest.resolve():
            # a crash may have kept those that were to go
            self.folder.drop_old(self.progress.step, self.config.save.keep)
        else:
            log.info("going on from %s: the checkpoints after it will be replaced", checkpoint)
            self.folder.set_latest(checkpoint)


def _resume_point(folder: RunFolder, resume: str) -> Path | None:
    """Which checkpoint to go on from; UserError rather than writing over a run."""
    found = folder.latest()
    if resume not in ("", "auto"):
        path = Path(resume)
        if not (path / "state.json").is_file():
            raise UserError(
                f"there is no training checkpoint {path}: resume from a folder such as RUN/checkpoints/step-000100"
            )
        if found is not None and path.resolve().parent != found.resolve().parent:
            raise UserError(f"{folder} already holds a run of its own: resume {path} with another --out")
        return path
    if found is not None and not resume:
        raise UserError(f"{folder} already holds a run ({found.name}): add --resume auto, or choose another --out")
    return found


def _with_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The model's files must say which ids begin and end a text here, whatever its preset said."""
    model = config.model.with_(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    return replace(config, model=model)


def _chosen_rows(
    model: LanguageModel, batches: Batches, processes: Processes, micro_batches: int, step: int
) -> dict[int, Rows]:
    """Where the rows that this process chooses experts for stand in an update's batch, by layer."""
    batch = batches.batch(step)
    tokens, followed = rows_of(batch.lengths, processes.shares(batch, micro_batches))
    return {n: followed if n == len(model.layers) else tokens for n in learned_gates(model)}
