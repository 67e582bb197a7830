"""The experiment for the issue vllm#41862: start vLLM in each combination of layout, kernel backends and kernel cache.

    grid.py        a cell is one start: what varies, in which order, and the command line of vLLM
    machine.py     which cells this machine can start, and why not the others
    caches.py      a private cache folder for each pair of a cold and a warm start
    server.py      the process group of one server: start, ask whether the server is ready, end
    looks.py       runs `collect` and `bundle` as child processes
    trial.py       one cell: start the server with the recorder, run `collect` when no rank records an event, end the
                   server
    outcome.py     how the start of a cell ended, and its file outcome.json
    experiment.py  runs all cells of one folder; a later `hmr cells` continues where an earlier one stopped
    table.py       the outcomes as text and as Markdown
    hypotheses.py  which explanations of vllm#41862 remain possible after the outcomes

`repro/commands/cells.py` has the flags.
"""
