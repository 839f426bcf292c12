"""Many variants of one model in one pass: gates by row, and blocks whose rows are equal computed once.

Knows modules and rows of a batch; nothing of scores and journals.
"""
