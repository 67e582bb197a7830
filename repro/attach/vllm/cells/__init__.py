"""The experiment of vllm#41862: start vLLM in each combination of layout, kernel backends and kernel cache.

    grid.py        a cell is one start: what varies, in which order, and the command line of vLLM
    machine.py     what this machine can start, and why it cannot start the others
    caches.py      a private cache folder for each pair of a cold and a warm start
    server.py      the process group of one server: start, ask whether it is ready, end
    looks.py       `collect` and `bundle` as child processes
    trial.py       one cell: start it recorded, look at it when it is silent, end it
    outcome.py     what became of a cell, and the file that says so
    experiment.py  all cells of one folder, again from where an earlier call stopped
    table.py       the outcomes as text and as Markdown
    hypotheses.py  which explanation of the report the outcomes leave

`repro/commands/cells.py` has the flags.
"""
