"""The views of results, a file for what belongs together; the registry of plots names them.

Knows rows of results and what figures are made of; nothing of files and columns of a page.
"""
