"""Formats of adapters of diffusion models, and what these models' modules are called by whom.

Knows keys and names; nothing of pipelines themselves.
"""
