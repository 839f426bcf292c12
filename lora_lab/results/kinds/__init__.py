"""Row classes of every kind of result: its columns with unit and meaning, and the registry of the kinds.

Knows no question that fills them, and no file.
"""
