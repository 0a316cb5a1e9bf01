"""inspect-ai on a model of ours, in process: `inspect eval task.py --model dsv4/runs/demo` (-M dtype=bfloat16 ...).

Found by its entry point. Only inspect imports this file: it needs inspect-ai (`pip install 'dsv4[eval]'`). Tools are
said to the model in V4's format, but calls are not read back: a task that needs tools is refused.
"""

from typing import Any

import anyio.to_thread
from inspect_ai.model import (  # pyright: ignore[reportMissingImports]
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo  # pyright: ignore[reportMissingImports]

from dsv4.engine import Engine
from dsv4.errors import UserError
from dsv4.probe.behaviour.endpoint import Params
from dsv4.probe.behaviour.inprocess import InProcess

MAX_TOKENS = 512


@modelapi(name="dsv4")
class InspectModel(ModelAPI):
    """model_name: a run or checkpoint folder. engine: an open one in its place. thinking: as InProcess."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  inspect's own signature
        engine: Engine | None = None,
        thinking: bool = False,
        dtype: str = "float32",
        device: str = "cpu",
        max_batch: int = 16,
        **unknown: Any,
    ):
        super().__init__(model_name, base_url, api_key, [], config)
        if unknown:
            raise UserError(f"the dsv4 provider has no argument {next(iter(unknown))!r}: see dtype, device, max_batch")
        opened = engine or Engine.open(model_name, dtype=dtype, device=device, max_batch=max_batch)
        self._endpoint = InProcess(opened, model_name, thinking=thinking)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        if tools:
            raise UserError("the dsv4 provider reads no tool calls yet: run a task without tools")
        if (config.num_choices or 1) != 1:
            raise UserError(f"num_choices={config.num_choices}: the dsv4 provider gives one answer, use epochs")
        said = [{"role": m.role, "content": m.text} for m in input]
        params = Params(
            config.max_tokens or MAX_TOKENS, 0.0 if config.temperature is None else config.temperature,
            1.0 if config.top_p is None else config.top_p, config.seed, tuple(config.stop_seqs or ()),
        )  # fmt: skip
        done = await anyio.to_thread.run_sync(self._endpoint.run, said, params)
        answer = self._endpoint.answer(said, done, params)
        read, written = len(done.prompt_ids), len(done.ids)
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=answer.text, model=self.model_name, source="generate"),
                    stop_reason="max_tokens" if done.finish_reason == "length" else "stop",
                )
            ],
            usage=ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written),
        )

    def max_connections(self) -> int:
        """As many as run in one batch."""
        return self._endpoint.workers

    def close(self) -> None:
        self._endpoint.close()
