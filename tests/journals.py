"""What journals hold, seen from outside while somebody writes to them."""

import sqlite3

from lora_lab.files.ownership import JOURNAL


def entries(place):
    """The keys of all entries of a journal, or of those in a folder; none of one that is just being begun."""
    keys = []
    for path in [place] if place.is_file() else place.glob("*.sqlite"):
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            keys += [key for (key,) in database.execute(f"SELECT key FROM {JOURNAL}")]
        except sqlite3.OperationalError:
            continue
        finally:
            database.close()
    return keys
