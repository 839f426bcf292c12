"""Many steps in one call: recipes in YAML (run), and claims of papers put to the test (reproduce).

Knows steps, what each hangs on, and mergekit's words for them; each step is a verb of another group.
"""
