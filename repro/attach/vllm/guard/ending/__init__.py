"""Who is gone, and how a process ends that must not wait any longer."""
