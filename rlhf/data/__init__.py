"""From the user's files to token batches.

loading.py   rows from files        splitting.py  held-out rows, mixtures     parsed.py   the rows of a run on disk
encoding.py  rows to token batches  batches.py    the dataclasses of tensors
"""

from rlhf.data.encoding import (
    MARGINS,
    SAFETY,
    EncodedPrompt,
    encode_demonstrations,
    encode_preferences,
    next_prompts,
    pad,
    prompt_batch,
    short_prompts,
)
from rlhf.data.loading import load_demonstrations, load_preferences, load_prompts
from rlhf.data.splitting import Row, Split, draw_rows, hold_out_everywhere, mix_preferences, split_held_out

__all__ = [
    "MARGINS",
    "SAFETY",
    "EncodedPrompt",
    "Row",
    "Split",
    "draw_rows",
    "encode_demonstrations",
    "encode_preferences",
    "hold_out_everywhere",
    "load_demonstrations",
    "load_preferences",
    "load_prompts",
    "mix_preferences",
    "next_prompts",
    "pad",
    "prompt_batch",
    "short_prompts",
    "split_held_out",
]
