"""PEFT's own format: configuration, keys, and which modules a pattern means.

Knows what PEFT would do by its source's rules; nothing of other formats.
"""
