"""The lab produces hangs on demand: settings, scenarios, the processes of a run, and the expected verdict."""
