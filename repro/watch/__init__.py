"""Watch a run, while it runs or later from its files: read the witnesses and facts, and write the verdict.

Nothing here depends on a scenario of the lab.
"""
