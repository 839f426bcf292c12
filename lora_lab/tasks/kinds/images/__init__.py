"""Kinds whose examples are images: classes by a head, and by their names in words (CLIP).

Knows pictures and image processors; nothing of texts but names of classes.
"""
