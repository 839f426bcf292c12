"""Within an adapter: what is left when parts are dropped or pruned, and what each of them is worth.

Knows games, masks and the worths of coalitions; nothing of other adapters.
"""
