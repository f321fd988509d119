"""Packing: the rows of a forward pass as one row of real tokens, in which equal prompts occur once.

Every response continues from the end of its prompt, in position and in attention: it sees its prompt and itself.

B rows of T columns, responses in the last R of them; N tokens in the packed row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.batches import first_with_prompt


@dataclass(frozen=True)
class Pack:
    read_BT: Tensor  # bool: the tokens in the packed row, row by row
    place_BT: Tensor  # int64: which of them has the state of this token, if it is real
    sees_NN: Tensor | None  # bool; None if nothing is shared: then restarting positions mark the rows


def pack(tokens_BT: Tensor, mask_BT: Tensor, response_length: int, share: bool = True) -> Pack:
    """Prompts are the columns before the last `response_length`; if that is 0, equal rows are read once."""
    P, row_B = tokens_BT.shape[1] - response_length, torch.arange(len(tokens_BT), device=tokens_BT.device)
    first_B = first_with_prompt(tokens_BT[:, :P], mask_BT[:, :P]) if share else row_B
    read_BT = mask_BT.clone()
    read_BT[:, :P] &= (first_B == row_B)[:, None]
    place_BT = read_BT.flatten().cumsum(0).view_as(read_BT) - 1
    place_BT[:, :P] = place_BT[first_B, :P]
    return Pack(read_BT, place_BT, _sees(read_BT, first_B, P) if bool((first_B != row_B).any()) else None)


def _sees(read_BT: Tensor, first_B: Tensor, P: int) -> Tensor:
    """sees_NN: for each token (row) the tokens it attends to (columns): those of its row and prompt, up to itself."""
    row_N, column_N = read_BT.nonzero(as_tuple=True)
    prompt_N = torch.where(column_N < P, row_N, -1)  # the row whose prompt is in the pack; -1 in responses
    sees_NN = row_N[:, None] == row_N
    sees_NN |= first_B[row_N][:, None] == prompt_N
    sees_NN &= column_N[:, None] >= column_N
    return sees_NN
