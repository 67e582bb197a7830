"""Watch a run: collect traces and facts, and have them judged, live or from the files of a run. Knows no scenario."""
