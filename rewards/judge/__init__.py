"""What the generative reward model is made of: rubrics and verdicts, prompts, client, cache, agreement measures."""
