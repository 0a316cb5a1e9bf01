"""One table: the tensors of a file and where they live in the model.

Model names are the published names, except that the routed experts are stacked: `experts.w13` [X, 2, I, M] holds
`experts.E.w1.weight` and `experts.E.w3.weight`, `experts.w2` [X, M, I] holds `experts.E.w2.weight`. The folder that
transformers' `save_pretrained` writes has the same names under `model.`, but for the few of `_TRANSFORMERS`.
"""

import re
from collections.abc import Iterator
from typing import Literal

Layout = Literal["published", "transformers"]
LAYOUTS: tuple[Layout, ...] = ("published", "transformers")
Place = tuple[int, ...]  # leading indices into a stacked tensor; () is the whole tensor

# published name -> transformers name, where it is not simply `model.` + published
_TRANSFORMERS = (
    (re.compile(r"^head\.weight$"), "head.weight"),
    (re.compile(r"^embed\.weight$"), "model.embed_tokens.weight"),
    (re.compile(r"^hc_head_(fn|base|scale)$"), r"model.hc_head.hc_\1"),
    (re.compile(r"^(layers\.\d+\.attn)\.kv_norm\.weight$"), r"model.\1.norm.weight"),
)


def file_names(name: str, shape: tuple[int, ...], layout: Layout) -> Iterator[tuple[str, Place]]:
    """The file tensors that make up model tensor `name`: (name in the file, place in the model tensor)."""
    for published, place in _published(name, shape):
        yield (published if layout == "published" else _to_transformers(published)), place


def layout_of(names: "set[str] | list[str]") -> Layout:
    return "transformers" if any(n.startswith("model.") for n in names) else "published"


def _published(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Place]]:
    stem, _, leaf = name.rpartition(".")
    if not stem.endswith("ffn.experts"):
        yield name, ()
        return
    for expert in range(shape[0]):
        if leaf == "w2":
            yield f"{stem}.{expert}.w2.weight", (expert,)
        else:
            yield f"{stem}.{expert}.w1.weight", (expert, 0)
            yield f"{stem}.{expert}.w3.weight", (expert, 1)


def _to_transformers(name: str) -> str:
    for pattern, target in _TRANSFORMERS:
        if pattern.match(name):
            return pattern.sub(target, name)
    return f"model.{name}"
