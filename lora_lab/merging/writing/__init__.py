"""Merges on disk: what is made so far, kept beside the output, and the adapter that PEFT loads, with its card.

Knows files; takes the merged adapter as it is.
"""
