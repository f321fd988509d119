"""Records for training: their schemas, a converter for each source form, and the data that the project ships."""

from reward_data.checks import Finding, check
from reward_data.errors import DataError
from reward_data.load import Loaded, Source, load
from reward_data.records import Demonstration, Message, Preference, Prompt, normalised_prompt, prompt_of

__all__ = [
    "DataError",
    "Demonstration",
    "Finding",
    "Loaded",
    "Message",
    "Preference",
    "Prompt",
    "Source",
    "check",
    "load",
    "normalised_prompt",
    "prompt_of",
]
