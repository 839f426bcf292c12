"""Adapters on models: put on and taken off, gates on their parts, and bases under several names.

Knows modules and their weights; nothing of files but where a base lies.
"""
