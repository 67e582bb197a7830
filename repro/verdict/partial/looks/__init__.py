"""Rules for what `collect` saw of a running job: two looks at its processes, lock files, connections and stacks."""
