"""The chat format of a run: `model.chat_format` and what the model's tokenizer brings.

The driver imports this; only models that are not `tiny` make it load transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlhf.chat import ChatFormat, ChatMessage, check_format, format_of, llama2
from rlhf.config import RunConfig
from rlhf.errors import UserError


def run_format(config: RunConfig) -> ChatFormat | None:
    """The format in which SFT trains the base model; None for `tiny`, whose tokenizer is made later, in Llama 2's format.

    UserError (2, 4) where the model cannot have the format that the settings ask for, or no dialogue could be masked.
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
    """Raises UserError (3) for messages that the run's chat format cannot hold."""
    chat = run_format(config)
    return chat.validate if chat else llama2.validate


def notice(config: RunConfig) -> str | None:
    """What becomes of the template that the model brings, unless the settings ask for it by name."""
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
    """UserError (4) where a stage would start from an artifact in another format than the settings ask for.

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
