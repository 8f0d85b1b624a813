"""Reinforcement learning of compressed policies. Nothing is in here yet."""
