"""Questions within an adapter: parts switched off, what each is worth, what can be pruned away.

Knows tables of coalitions and prunings; computes nothing.
"""
