"""Chat formats: messages to token ids, and back."""

from rlhf.chat.llama2 import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    TAGS,
    TEMPLATE,
    ChatMessage,
    Turn,
    decode_answer,
    encode_answer,
    encode_dialogue,
    encode_prompt,
    validate,
)

__all__ = [
    "B_INST",
    "B_SYS",
    "E_INST",
    "E_SYS",
    "TAGS",
    "TEMPLATE",
    "ChatMessage",
    "Turn",
    "decode_answer",
    "encode_answer",
    "encode_dialogue",
    "encode_prompt",
    "validate",
]
