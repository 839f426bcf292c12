"""Kinds whose base reads a text and answers by a head: classes, numbers, tags, places in the text.

Knows heads and tokens; nothing of models that generate.
"""
