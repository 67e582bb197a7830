"""Continue prompts with one model in this process: greedy decoding, with or without drafts."""
