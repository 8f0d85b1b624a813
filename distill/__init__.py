"""Distillation: small students and recovery of compressed models. Nothing is in here yet."""
