"""The server around the model. Each rank has one :class:`~hybrid_moe_ref.engine.lifecycle.Engine`.

at a start     lifecycle      the phases, in order
               startup/       their parts: refusal, builds, vote, autotune, compilation, kernel backends
in each step   serving        the loop: schedule, run, sample, ask whether anyone is unfinished
               scheduler      which requests run, with how many tokens each
               steps, plan    this rank's proposal for the step, and the schedule of its collectives
               protocol       the step agreement (C1) and the question, as a version of vLLM has them
               runner         agree, give the layers the agreed sizes, run the model
               graphs, microbatch   replay a captured size; split a step in two
               drafting, verification, sampling   drafts of the MTP layer, their check, the choice of tokens
decisions      policies       what the ranks must decide alike; a scenario replaces one by a wrong one
settings       server_config  the configuration that is equal on every rank
"""
