"""Watch a run: collect traces and facts, and judge them, live or from files. Does not depend on any scenario."""
