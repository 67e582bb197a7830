"""From traces and facts to a verdict: live, or afterwards from the files. Knows no scenario."""
