"""How completions are sampled."""
