"""Reward-model training against a bare torch loop on the same tokens: tokens per second.

    python -m benchmarks.reward --model FOLDER --out reward.json

benchmarks/bare.py makes the sides comparable. The bare loop is a transformers backbone, a linear head read at the last
token of each response, and the ranking loss with its margins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bare import Batch, Stage, add_sizes, run
from benchmarks.turns import parser_of
from rlhf.models import load_causal
from stages import reward


class Scorer(nn.Module):
    """A backbone and a float32 head that begins at zero."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        hidden_BTH = self.backbone(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        hidden_BH = hidden_BTH[torch.arange(len(tokens_BT)), mask_BT.sum(1) - 1]
        with torch.autocast(tokens_BT.device.type, enabled=False):
            return self.head(hidden_BH.float())[:, 0]


def load(folder: Path) -> nn.Module:
    causal: Any = load_causal(folder)
    return Scorer(causal.model)


def loss_of(model: nn.Module, passes: Sequence[Batch]) -> Iterator[Tensor]:
    """Mean over the pairs of a step; chosen responses are the first half of each pass."""
    for batch in passes:
        chosen_B, rejected_B = model(batch["input_ids"], batch["attention_mask"]).chunk(2)
        yield -F.logsigmoid(chosen_B - rejected_B - batch["margin"]).mean() / len(passes)


def tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].sum())


STAGE = Stage("reward/reward", "reward/loss", reward.Trainer, reward.main, load, loss_of, tokens)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = parser_of("reward", __doc__)
    add_sizes(parser, batch=8, micro_batch=4, max_length=256, rows=256)
    return run(STAGE, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
