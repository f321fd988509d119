"""The chat format of a run, from `model.chat_format` and the model's tokenizer.

The driver imports this; it loads transformers only for models other than `tiny`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlhf.chat import ChatFormat, ChatMessage, check_format, format_of, llama2
from rlhf.config import RunConfig
from rlhf.errors import UserError


def run_format(config: RunConfig) -> ChatFormat | None:
    """The format in which SFT trains the base model; None for `tiny`, whose tokenizer is made later, in Llama 2's
    format.

    UserError (2, 4) if the model does not have the format of the settings, or if it cannot be masked.
    """
    path, setting = config.model.path, config.model.chat_format
    if path == "tiny":
        if setting == "tokenizer":
            raise UserError("model.chat_format: `tiny` is made without a chat template of its own; set auto or llama2")
        return None
    from rlhf.models import load_tokenizer

    chat = format_of(load_tokenizer(path, setting))
    try:
        check_format(chat)
    except UserError as error:
        text = f"model.chat_format: {chat.name} does not work with the tokenizer of {path}: {error.message}"
        raise UserError(text) from error
    return chat


def message_check(config: RunConfig) -> Callable[[Sequence[ChatMessage]], None]:
    """Raises UserError (3) for messages that the run's chat format cannot encode."""
    chat = run_format(config)
    return chat.validate if chat else llama2.validate


def notice(config: RunConfig) -> str | None:
    """A line about what happens to the model's own template, unless the settings name it."""
    path, setting = config.model.path, config.model.chat_format
    if path == "tiny" or setting == "tokenizer":
        return None
    from rlhf.models import load_tokenizer

    if format_of(load_tokenizer(path)).name == "llama2":
        return None
    template = f"the template that the tokenizer of {path} brings"
    if setting == "llama2":
        return f"chat format: llama2 replaces {template} (model.chat_format)"
    return f"chat format: {template} (model.chat_format: auto); set llama2 to replace it"


def check_inputs(config: RunConfig, inputs: Mapping[str, Path]) -> None:
    """UserError (4) if a stage would start from an artifact in another format than that of the settings.

    With `auto` the format is the artifact's.
    """
    if config.model.chat_format == "auto":
        return
    from rlhf.models import load_tokenizer

    chat = run_format(config)
    template = chat.tokenizer.chat_template if chat else llama2.TEMPLATE
    for name, folder in inputs.items():
        if load_tokenizer(folder).chat_template != template:
            raise UserError(
                f"model.chat_format is {config.model.chat_format}, but {name} was trained in another chat format "
                f"({folder}): set model.chat_format to auto, which keeps the artifact's, or run {name} again",
                4,
            )
