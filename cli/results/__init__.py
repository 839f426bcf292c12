"""Numbers and what becomes of them: evaluate, figures, reports, and what results hold.

Knows result files; trains and changes nothing.
"""
