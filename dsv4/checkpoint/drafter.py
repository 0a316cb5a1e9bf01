"""Whether the drafter in a folder is that of the model in it: by names and shapes, before any weight is read.

Tensors of another release load without an error where they happen to fit, and then every draft is refused. What their
shapes can tell is told here in one sentence; what they cannot, `engine.acceptance` measures.
"""

from collections.abc import Mapping
from pathlib import Path

from dsv4.config import ModelConfig
from dsv4.errors import UserError


def check_drafter(folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """UserError that names all in which a folder's `mtp.*` tensors are not of the drafter that its configuration
    describes. shapes: of these tensors by published name (of codes where they are packed; none of those is read)."""
    wrong = mismatches(config, shapes)
    if wrong:
        raise UserError(
            f"the drafter in {folder} is not this model's: {'; '.join(wrong)}. Take the mtp.* tensors and the "
            "config.json of one release, or load the trunk alone with load(folder, mtp=False)"
        )


def mismatches(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What `check_drafter` says, a part of a sentence each; a tensor that is missing is the loader's to say."""
    wide, vocab = config.hidden_size, config.vocab_size
    is_mtp = any(name.startswith("mtp.0.e_proj") for name in shapes)
    if not config.dspark_stages:
        return (
            ["it is a DSpark drafter, and config.json has no dspark_* keys"]
            if "mtp.0.main_proj.weight" in shapes
            else []
        )
    if is_mtp:
        return ["it is an MTP block, and config.json describes a DSpark drafter"]
    wrong = []
    stages = len({name.split(".")[1] for name in shapes})
    if stages != config.dspark_stages:
        wrong.append(f"it has {stages} stages, config.json says {config.dspark_stages}")
    last = f"mtp.{config.dspark_stages - 1}."
    main = shapes.get("mtp.0.main_proj.weight", ())
    if len(main) == 2:
        layers = len(config.dspark_target_layer_ids)
        if main[0] != wide:
            wrong.append(f"it is {main[0]} wide, the trunk {wide}")
        if main[0] and main[1] != layers * main[0]:
            read = f"{main[1] // main[0]} target layers" if main[1] % main[0] == 0 else f"{main[1]} numbers"
            wrong.append(f"it reads {read}, dspark_target_layer_ids has {layers}")
    rows = shapes.get(f"{last}markov_head.markov_w1.weight", ())
    if len(rows) == 2:
        if rows[0] != vocab:
            wrong.append(f"its vocabulary has {rows[0]} tokens, the trunk's {vocab}")
        if rows[1] != config.dspark_markov_rank:
            wrong.append(f"its Markov head has rank {rows[1]}, dspark_markov_rank is {config.dspark_markov_rank}")
    return wrong
