"""The server around the model: what a step is, how ranks agree on it, and the phases before the first one."""
