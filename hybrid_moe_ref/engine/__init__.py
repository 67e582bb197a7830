"""The server around the model: its start-up phases, its steps, and how the ranks agree on each step."""
