"""The rollout room: tasks in, groups of token-exact completions out, weights back in place."""
