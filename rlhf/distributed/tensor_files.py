"""Files of tensors in checkpoints: reading one runs none of its content, whoever wrote it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from rlhf.errors import UserError


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote: tensors, numbers, strings, and lists and dicts of them. Tensors stay on the disk until
    they are used. UserError (4) for a file that holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not a file of tensors, and nothing of it was run ({reason}). Remove it.", 4
        ) from None
