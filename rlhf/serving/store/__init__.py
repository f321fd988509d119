"""What was said and what people thought of it: SQLite in a file, or PostgreSQL.

tables.py  users, exchanges, scores, votes, alarms     store.py    one database     migrations/  how it came to be
writer.py  a thread that writes, and waits for a database that is away      redact.py    texts without personal data
"""

from rlhf.serving.store.redact import redacted
from rlhf.serving.store.store import Deleted, Store
from rlhf.serving.store.tables import Exchange, Score, Vote
from rlhf.serving.store.writer import Writer

__all__ = ["Deleted", "Exchange", "Score", "Store", "Vote", "Writer", "redacted"]
