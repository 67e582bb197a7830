"""The server around the model. Each rank has one :class:`~hybrid_moe_ref.engine.lifecycle.Engine`.

lifecycle      the phases of a start, in order, then the serve loop
startup/       the parts of a start: refusal, builds, vote, autotune, compilation, kernel backends
serving/       what a rank does between its steps: the loop, the scheduler, drafts and their check, the choice of tokens
step/          one model execution: its plan, the step agreement (C1), graphs, two halves
policies       what the ranks must decide alike; a scenario replaces one by a wrong one
server_config  the configuration that is equal on every rank
local          a whole server on this machine, for one prompt
"""
