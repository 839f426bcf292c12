"""Adapters in and out of files: read with all that is wrong, written with their record, converted, made for servers.

Knows formats by their registry; nothing of models.
"""
