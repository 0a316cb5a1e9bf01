"""lm-eval (0.4.13) on a model of ours: `--model dsv4`, and the capability that stands beside a robustness figure.

lm-eval 0.4.13 knows models by name only when somebody has registered them, so its own command line runs through here:
`python -m dsv4.probe.behaviour.lm_eval_cli run --model dsv4 --model_args pretrained=runs/demo --tasks ...`.
Later versions find the model by its entry point. This file needs lm-eval (`pip install 'dsv4[eval]'`).
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from dsv4.engine import Engine, SamplingParams
from dsv4.errors import UserError
from dsv4.text import render

log = logging.getLogger("dsv4")

TOKENS_AT_ONCE = 4096
SAID = ("do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k", "min_p", "seed")


@register_model("dsv4")
class HarnessModel(TemplateLM):
    """pretrained: a run or checkpoint folder, or an Engine. max_length: tokens of context, at most the model's.

    A text begins with a bos, as in training. Log-likelihoods are the model's own log-softmax over its whole vocabulary,
    in fp32, summed in fp64. What is too long loses its oldest tokens (not the bos), which is said once.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | Engine,
        dtype: str = "float32",
        device: str | None = "cpu",
        batch_size: int | str | None = 16,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise UserError(f"--model dsv4 has no argument {next(iter(unknown))!r}: see pretrained, dtype, max_length")
        batch = int(str(batch_size)) if str(batch_size).isdigit() else 16
        if str(device).startswith("cuda") and not torch.cuda.is_available():  # lm-eval's own default
            log.warning("there is no %s here: running on the CPU", device)
            device = "cpu"
        opened = isinstance(pretrained, Engine)
        self.engine = pretrained if opened else Engine.open(
            pretrained, dtype=dtype, device=device or "cpu", max_batch=max(1, batch)
        )  # fmt: skip
        longest = self.engine.config.max_position_embeddings
        self.max_length = min(int(max_length or longest), longest)
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length} must be at least 2")
        self._max_gen_toks = int(max_gen_toks)
        self._name = "dsv4" if opened else str(pretrained)
        self._rendered: dict[
            str, list[int]
        ] = {}  # prompts of the chat format, whose control tokens a text cannot spell
        self._told: set[str] = set()

    # --- text and ids ------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.engine.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.engine.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"dsv4-{self.engine.tokenizer.fingerprint()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return "dsv4.text.render, edition april" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise UserError("dsv4 answers from the start of a turn: leave out gen_prefix")
        prompt = render(chat_history)
        self._rendered[prompt.text] = prompt.ids(self.engine.tokenizer)
        return prompt.text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with a bos unless add_special_tokens is False; of a rendered conversation, its own."""
        if string in self._rendered:
            return list(self._rendered[string])
        ids = self.engine.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._rendered:  # an answer is tokenised apart from its prompt, as when a model writes it
            return list(self._rendered[context]), self.engine.tokenizer.encode(continuation)
        return super()._encode_pair(context, continuation)

    # --- what is asked -----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]))
        results: dict[int, tuple[float, bool]] = {}
        batch: list[int] = []
        for i in [*order, None]:
            size = 0 if i is None else len(requests[i][1]) + len(requests[i][2])
            if batch and (i is None or size * (len(batch) + 1) > TOKENS_AT_ONCE):
                for j, result in zip(batch, self._scores([requests[j][1:3] for j in batch]), strict=True):
                    results[j] = result
                    if requests[j][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[j][0], result)
                batch = []
            if i is not None:
                batch.append(i)
        return [results[i] for i in range(len(requests))]

    @torch.no_grad()
    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of continuations, computed side by side without padding."""
        runs, rows, begin = [], [], 0
        for context, continuation in pairs:
            if not continuation:
                raise UserError("lm-eval asks for the likelihood of an empty text: mend the task")
            ids = self._fitted(context, len(continuation) - 1, continuation[:-1])
            runs.append(ids)
            rows += range(begin + len(ids) - len(continuation), begin + len(ids))
            begin += len(ids)
        model = self.engine.model
        flat = torch.tensor([i for ids in runs for i in ids], device=model.device)
        logits = model(flat, segments=[len(ids) for ids in runs], rows=torch.tensor(rows, device=model.device))
        told = logits.log_softmax(-1)
        results, at = [], 0
        for _, continuation in pairs:
            want = torch.tensor(continuation, device=told.device)
            part = told[at : at + len(want)]
            greedy = bool((part.argmax(-1) == want).all())
            results.append((float(part.gather(1, want[:, None]).double().sum()), greedy))
            at += len(want)
        return results

    def _fitted(self, context: list[int], after: int, more: list[int]) -> list[int]:
        """context and more, within max_length: the oldest tokens of the context go, but not its bos."""
        room = self.max_length - after
        if len(context) <= room:
            return [*context, *more]
        if room < 1:
            raise UserError(f"a continuation of {after + 1} tokens does not fit into max_length={self.max_length}")
        self._once(f"some prompts have more than max_length={self.max_length} tokens: their oldest tokens are left out")
        kept = context[len(context) - room :] if context[0] != self.prefix_token_id or room == 1 else [
            context[0], *context[len(context) - room + 1 :]
        ]  # fmt: skip
        return [*kept, *more]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: each token once, with as much before it as max_length allows."""
        totals = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(parts))
            totals.append(float(total))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), float(total))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, all requests together."""
        prompts, params = [], []
        for text, given in (request.args for request in requests):
            said = normalize_gen_kwargs(given, self._max_gen_toks)
            for name in sorted(set(said) - set(SAID)):
                self._once(f"lm-eval asks for {name}={said[name]!r} in generation, which dsv4 has not: it is left out")
            most = min(int(said["max_gen_toks"]), self.max_length - 1)
            prompts.append(self._fitted(self.tok_encode(text), most, []))
            params.append(
                SamplingParams(
                    temperature=float(said.get("temperature", 0.0)), top_p=float(said.get("top_p", 1.0)),
                    top_k=int(said.get("top_k", 0)), min_p=float(said.get("min_p", 0.0)), seed=said.get("seed", 0),
                    max_tokens=most, stop=[stop for stop in said.get("until", []) if stop],
                )
            )  # fmt: skip
        done = self.engine.generate(prompts, params)
        if any(c.finish_reason == "error" for c in done):
            raise UserError("the model's numbers are not finite: try dtype=float32, or check the weights")
        for request, completion in zip(requests, done, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return [c.text for c in done]

    def _once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            log.warning("%s", sentence)


def capability(
    engine: Engine, tasks: Sequence[str], limit: int | None = None, include: str | None = None
) -> dict[str, dict[str, float]]:
    """task -> metric -> figure of lm-eval's tasks (MMLU, MATH, HumanEval, RULER ...). include: a folder with tasks of
    one's own. UserError for a task that is unknown or whose data cannot be had."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    try:
        found = simple_evaluate(
            HarnessModel(engine), tasks=list(tasks), limit=limit, bootstrap_iters=0, log_samples=False,
            task_manager=TaskManager(include_path=include),
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"lm-eval cannot run {', '.join(tasks)} ({' '.join(str(error).split())[:200]})") from None
    assert found is not None
    return {
        task: {name: float(x) for name, x in figures.items() if isinstance(x, int | float) and "stderr" not in name}
        for task, figures in found["results"].items()
    }
