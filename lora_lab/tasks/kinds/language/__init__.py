"""Kinds whose base is a language model: losses, choices, generated answers, preferences.

Knows tokens and their likelihoods; nothing of heads.
"""
