"""The server around the model. Each rank has one :class:`~hybrid_moe_ref.engine.lifecycle.Engine`.

lifecycle      the phases of a start, in order, then the serve loop
startup/       what runs once, at a start: the refusal of unsafe configurations, kernel builds, the vote, autotuning,
               compilation, kernel backends
serving/       what a rank does between its model executions: the serve loop, the scheduler, drafts and their
               verification, sampling
step/          one model execution: its plan, the step agreement (C1), graphs, the split of a step in two
policies       the objects that make the decisions which must be equal on all ranks; a scenario replaces one of these
               objects by a faulty one
server_config  the configuration that is equal on every rank
local          a whole server on this machine, for one prompt
"""
