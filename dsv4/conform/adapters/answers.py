"""The adapter for answers in a file: what a port in another language has written for the cases of `--write`."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dsv4 import files
from dsv4.conform.adapter import Adapter, Missing
from dsv4.conform.cases import Case
from dsv4.conform.folder import tensor_name
from dsv4.errors import UserError


class Answers(Adapter):
    """Tensors NNN.right.NAME in a .safetensors file; cases that have none are not implemented."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32):
        self.name, self.dtype = f"answers of {path}", dtype
        try:
            self.tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({files.reason_of(error)}): give a .safetensors file") from None

    def load(self, folder: Path) -> None:
        """There is nothing to load."""

    def answer(self, number: int, case: Case) -> dict[str, Tensor]:
        """What the file says to case `number`."""
        prefix = tensor_name(number, "right", "")
        found = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        if not found:
            raise Missing("no answer in the file")
        return found
