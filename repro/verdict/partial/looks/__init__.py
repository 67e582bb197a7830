"""Rules for what `collect` saw of a running job in two looks: its processes, lock files, connections and stacks."""
