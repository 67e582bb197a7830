"""Continue prompts with one model in this process: greedy decoding, and the same with drafts."""
