"""SFT against a bare torch loop on the same tokens: tokens per second.

    python -m benchmarks.sft --model FOLDER --out sft.json

benchmarks/bare.py makes the sides comparable. The bare loop runs the LM head on response tokens only, as the stage
does; a loop that takes transformers' own loss over all positions is slower. Rows are packed unless `--no-packing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bare import Batch, Stage, add_sizes, run
from benchmarks.turns import parser_of
from rlhf.models import load_causal
from stages import sft


def loss_of(model: nn.Module, passes: Sequence[Batch]) -> Iterator[Tensor]:
    """-Σ log p of each pass over the response tokens of the step."""
    causal: Any = model
    count = sum(int((batch["labels"][:, 1:] != sft.IGNORED).sum()) for batch in passes)
    for batch in passes:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden_BTH = causal.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        labels_BT = batch["labels"][:, 1:]
        answer_BT = labels_BT != sft.IGNORED
        logits_NV = causal.lm_head(hidden_BTH[answer_BT])
        yield F.cross_entropy(logits_NV.float(), labels_BT[answer_BT], reduction="sum") / count


def tokens(batch: Batch) -> int:
    """Those of rows; a packed pass has no others."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return int(mask.sum())


STAGE = Stage("sft", "sft/loss", sft.Trainer, sft.main, load_causal, loss_of, tokens)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = parser_of("sft", __doc__)
    add_sizes(parser, batch=4, micro_batch=2, max_length=256, rows=256)
    return run(STAGE, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
