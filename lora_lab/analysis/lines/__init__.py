"""Between adapters: the line, one layer at a time, along training, planes and trained curves.

Knows paths between adapters and scores along them; nothing of what parts are worth.
"""
