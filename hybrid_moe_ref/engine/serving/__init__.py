"""What a rank does between its model executions.

loop           schedules, runs and samples each step, and asks whether any rank has unfinished work
scheduler      decides which requests run, and with how many tokens each
steps          plans the steps of this rank, and runs those in which it has no requests
drafting       drafts tokens with the MTP layer (multi-token prediction)
verification   accepts or rejects the drafts
sampling       chooses the next tokens
"""
