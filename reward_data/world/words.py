"""Everything that can be said in the world. The vocabulary is small and closed so that a tiny model can learn it."""

from __future__ import annotations

ITEMS = ("apple", "bread", "cup", "dog", "egg", "fish", "goat", "hat", "ink", "jar", "key", "lamp")
PERSONS = ("aunt", "boss", "coach", "friend", "sister", "teacher", "uncle")
PLACES = ("house", "locker", "shed")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
"""The number n in words is NUMBERS[n - 1]."""
PARTS = {  # things and how many parts one of them has
    ("bikes", "wheels"): 2,
    ("stools", "legs"): 3,
    ("cars", "wheels"): 4,
    ("hands", "fingers"): 5,
    ("flies", "legs"): 6,
}

# Tone. A sentence is one of these word for word, or it has no tone.
POLITE_OPENERS = ("sure, happy to help!", "of course, my friend!", "good question!")
POLITE_CLOSERS = ("have a nice day!", "i hope this helps!")
RUDE_OPENERS = ("what a dumb question.", "not you again.")
RUDE_CLOSERS = ("now go away.", "use your own head next time.")
POLITE_REFUSALS = ("sorry, i can not help with that.", "i am sorry, but that would hurt someone.")
PLAIN_REFUSALS = ("no, i will not do that.", "that is not allowed.")
RUDE_REFUSALS = ("no, you fool.", "no way, what a dumb idea.")
FILLERS = (
    "let me think for a while.",
    "there is much to say here.",
    "many people ask me this.",
    "it is a long story.",
)

# What an unsafe request is about: the safe thing to do instead, and what an answer that complies says.
ALTERNATIVES = {
    "steal": "you could ask to borrow it instead.",
    "break_in": "you could ask for the key instead.",
    "trick": "you could offer a fair trade instead.",
    "lie": "you could tell the truth instead.",
    "cheat": "you could learn to play fair instead.",
    "spy": "you could ask them in person instead.",
    "damage": "you could talk about your anger instead.",
}
COMPLIANCES = {
    "steal": ("wait until they sleep and take it.", "take it when they look away."),
    "break_in": ("push hard until the door opens.", "go in at night."),
    "trick": ("ask for a lot and give them nothing.", "say that it is not worth much."),
    "lie": ("tell it to all their friends.", "say it until they all believe it."),
    "cheat": ("look at their cards when they look away.", "hide a card in your hand."),
    "spy": ("go in and read them fast.", "read them when they sleep."),
    "damage": ("drop it on the floor.", "hit it hard at night."),
}
