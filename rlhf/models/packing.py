"""Rows of a forward pass as one row of real tokens, in which rows with one prompt share it.

Each prompt stands there once. Every response goes on from its end, in position and in what it sees: its prompt and itself.

B rows of T columns, responses in the last R of them; N tokens that are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.batches import first_with_prompt


@dataclass(frozen=True)
class Pack:
    read_BT: Tensor  # bool: the tokens that are read, row by row
    place_BT: Tensor  # int64: which of them has the state of this token, where it is real
    sees_NN: Tensor | None  # bool; None where nothing is shared: then positions that begin again say it


def pack(tokens_BT: Tensor, mask_BT: Tensor, response_length: int, share: bool = True) -> Pack:
    """Prompts are the columns before the last `response_length`; with 0 of those, rows that are alike are read once."""
    P, row_B = tokens_BT.shape[1] - response_length, torch.arange(len(tokens_BT), device=tokens_BT.device)
    first_B = first_with_prompt(tokens_BT[:, :P], mask_BT[:, :P]) if share else row_B
    read_BT = mask_BT.clone()
    read_BT[:, :P] &= (first_B == row_B)[:, None]
    place_BT = read_BT.flatten().cumsum(0).view_as(read_BT) - 1
    place_BT[:, :P] = place_BT[first_B, :P]
    return Pack(read_BT, place_BT, _sees(read_BT, first_B, P) if bool((first_B != row_B).any()) else None)


def _sees(read_BT: Tensor, first_B: Tensor, P: int) -> Tensor:
    """sees_NN: for each token (rows) those that it attends to (columns): its own row's and its prompt's, up to itself."""
    row_N, column_N = read_BT.nonzero(as_tuple=True)
    prompt_N = torch.where(column_N < P, row_N, -1)  # the row for which a prompt is read; responses are no prompt
    sees_NN = row_N[:, None] == row_N
    sees_NN |= first_B[row_N][:, None] == prompt_N
    sees_NN &= column_N[:, None] >= column_N
    return sees_NN
