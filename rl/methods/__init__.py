"""One file for each RL method: pure functions of tensors, whose keyword-only arguments are its settings."""
