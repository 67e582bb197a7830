"""One model execution on one rank.

plan           defines this rank's proposal for the step, and the schedule of the step's collectives
protocol       defines what the ranks exchange in the step agreement (C1), and in the question "is anyone unfinished?"
runner         agrees on the step, gives the layers the agreed sizes, runs the model
graphs         captures steps of a few sizes, and replays them
microbatch     splits a step in two
feed           compares the tokens of the step between tensor-parallel ranks
"""
