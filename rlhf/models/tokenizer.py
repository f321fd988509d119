"""The tokenizer of a model folder, ready for training: EOS ids, a pad token, the chat template."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rlhf.chat import FORMATS, format_of
from rlhf.errors import UserError
from rlhf.models.folders import LOAD_ERRORS, adapter_base, find_model, has_tokenizer, is_adapter, why

log = logging.getLogger(__name__)


def load_tokenizer(path: str | Path, chat_format: str = "auto") -> Any:
    """The tokenizer of a model folder with an EOS, a pad token that ends no response, and the template of
    `chat_format`.

    `auto` keeps the folder's template, which in an artifact is the one it was trained with; without a template it is
    `llama2`. UserError (4) if the tokenizer cannot be read or has no EOS, (2) if `tokenizer` finds no template.
    """
    folder = find_model(path, weights=False)
    source = adapter_base(folder) if is_adapter(folder) and not has_tokenizer(folder) else folder
    if source != folder:
        return load_tokenizer(source, chat_format)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot read a tokenizer from {folder}: {why(error)}", 4) from error
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token  # BERT's names
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no EOS token, so no response could end", 4)
    tokenizer.model_eos_ids = _model_eos_ids(tokenizer, folder)
    _separate_pad(tokenizer, format_of(tokenizer).stop_ids, folder)
    if chat_format == "tokenizer" and not tokenizer.chat_template:
        raise UserError(
            f"model.chat_format is tokenizer, but the tokenizer in {folder} brings no chat template: set llama2, or put "
            f"the template into {folder / 'chat_template.jinja'}"
        )
    if chat_format == "auto":
        chat_format = "tokenizer" if tokenizer.chat_template else "llama2"
    tokenizer.chat_template = FORMATS[chat_format].template or tokenizer.chat_template
    return tokenizer


def _model_eos_ids(tokenizer: Any, folder: Path) -> list[int]:
    """Ids at which transformers' `generate` stops. Only special tokens: the default EOS of some families is an ordinary
    word in another tokenizer."""
    while is_adapter(folder):
        folder = adapter_base(folder)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for name in ("generation_config.json", "config.json"):
        with suppress(OSError, ValueError):
            found = json.loads((folder / name).read_text()).get("eos_token_id")
            if found is not None:
                return [token for token in (found if isinstance(found, list) else [found]) if token in special]
    return []


def _separate_pad(tokenizer: Any, stop_ids: Collection[int], folder: Path) -> None:
    """The pad token must not be a stop id: the end of a response would look like padding to tools that compare ids."""
    if tokenizer.pad_token_id not in (None, *stop_ids):
        return
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = [token for token in special if "pad" in token.lower()]
    reserved = [token for token in special if "reserved" in token.lower()]
    taken = (tokenizer.bos_token, *tokenizer.convert_ids_to_tokens(list(stop_ids)))
    template = str(tokenizer.chat_template)
    candidates = [t for t in [*named, tokenizer.unk_token, *reserved, *special] if t is not None and t not in taken]
    spare = [token for token in candidates if token not in template]
    pad = spare[0] if spare else "<pad>"
    tokenizer.add_special_tokens({"pad_token": pad})
    origin = "a token it had" if spare else "added, so the embeddings grow by one row"
    log.info("%s: pad was missing or ends a response; pad is now %r (%s)", folder, pad, origin)
