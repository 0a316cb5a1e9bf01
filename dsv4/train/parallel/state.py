"""The state of a run that several processes share, as torch.distributed.checkpoint writes and reads it.

Every process writes its parts into a file of its own, and any number of processes reads them again, each what it needs:
4 -> 2 -> 1, or the other way. The files are safetensors, whose header says in JSON which part of which tensor is where
(torch's HuggingFaceStorageWriter). DCP's usual format is not used: its metadata and scalars are pickled. All processes
need the same file system.
"""

import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dsv4.errors import FileError, UserError
from dsv4.files import DIGESTS, check_digests, make_folder, reason_of, sha256_of, synchronise, write_json
from dsv4.model import LanguageModel
from dsv4.train.optim import HybridOptimizer


def save_sharded(folder: Path, model: LanguageModel, optimizer: HybridOptimizer, *, safe: str) -> None:
    """Write weights, buffers and momenta into a new folder, digests beside them; all processes call it together.

    FileError in all of them, with `safe` in it, if the machine does not let one of them write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    rank = dist.get_rank()
    make_folder(folder)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(_state(model, optimizer), storage_writer=writer)
    except CheckpointException as error:
        failed = next(iter(error.failures.values()))[0]
        raise FileError(f"cannot write {folder}: {reason_of(failed)}; {safe}") from None
    digests: list[dict[str, str]] = [{}] * dist.get_world_size()
    own = {path.name: sha256_of(path) for path in sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))}
    dist.all_gather_object(digests, own)
    if rank == 0:
        found = {name: digest for each in digests for name, digest in each.items()}
        assert set(found) == {path.name for path in folder.glob("*.safetensors")}, "a file that nobody has written"
        write_json(folder / DIGESTS, found, safe=safe)
        synchronise(folder)


def load_sharded(folder: Path, model: LanguageModel, optimizer: HybridOptimizer) -> None:
    """Fill model and optimiser in place from what any number of processes has written; one process alone, or all of
    those that share the model. UserError, and nothing filled, if a file is damaged or of another model."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    remedy = "resume from another checkpoint"
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    numbers = {path.name: i for i, path in enumerate(sorted(folder.glob("*.safetensors")))}
    check_digests(folder, lambda name: numbers.get(name, 0) % world == rank)  # each process looks at its share of them
    state = _state(model, optimizer)
    reader = HuggingFaceStorageReader(str(folder))
    try:
        there = reader.read_metadata().state_dict_metadata
    except Exception as error:  # safetensors has no class of its own for every damage
        raise UserError(f"{folder} is damaged ({reason_of(error)}): {remedy}") from None
    for name in sorted(there.keys() ^ state.keys()):
        raise UserError(f"{folder} and the model do not have the same parts ({name} is in one alone): {remedy}")
    for name, about in there.items():
        if tuple(about.size) != tuple(state[name].shape):  # type: ignore[union-attr]
            raise UserError(
                f"{name} is {list(about.size)} in {folder}, but {list(state[name].shape)} in this model: {remedy}"  # type: ignore[union-attr]
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is meant, of one process
        load(state, storage_reader=reader, no_dist=world == 1)


def whole_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The whole weights and buffers, on the CPU, in the first process (the others have an empty dict); all processes
    call it together."""
    found = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if dist.get_rank() == 0:
            found[name] = full.detach().cpu()
    return found


def _state(model: LanguageModel, optimizer: HybridOptimizer) -> dict[str, Any]:
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {**weights, **{f"optimizer.{name}": tensor for name, tensor in optimizer.state_dict().items()}}
