"""What a rank does between its model executions.

loop           schedule, run, sample, ask whether anyone is unfinished
scheduler      which requests run, with how many tokens each
steps          plan the steps of this rank, and run those in which it has no requests
drafting, verification, sampling   drafts of the MTP layer, their check, the choice of tokens
"""
