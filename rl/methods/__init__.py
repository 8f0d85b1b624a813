"""One file for each RL method."""
