"""Find which processes have ended, and end a process that must not wait any longer."""
