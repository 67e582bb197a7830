"""One model execution on one rank.

plan           this rank's proposal for the step, and the schedule of its collectives
protocol       the step agreement (C1) and the question whether anyone is unfinished, as a version of vLLM has them
runner         agree, give the layers the agreed sizes, run the model
graphs         replay a captured size
microbatch     split a step in two
feed           the tokens of the step, compared between tensor-parallel ranks
"""
