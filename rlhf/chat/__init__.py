"""Chat formats: messages to token ids, and back.

formats.py   the interface, the registry, and which format a tokenizer has      llama2.py    exact, by hand
template.py  the tokenizer's own Jinja template, masked by rendered prefixes    messages.py  what they share
"""

from rlhf.chat.formats import FORMATS, ChatFormat, check_format, format_of
from rlhf.chat.messages import ChatMessage

__all__ = ["FORMATS", "ChatFormat", "ChatMessage", "check_format", "format_of"]
