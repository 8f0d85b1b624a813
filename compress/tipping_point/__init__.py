"""Tipping points: Gaussian processes that know what they do not know, and decisions that heed it."""

from .decision import Policy, solve
from .gaussian_process import GaussianProcess, LogPosterior, most_likely, sample_hyperparameters
from .gpdp import gp_policy
from .parametric import Fit, Posterior, fit, sample
from .population import Allen, Myers, Ricker, simulate_unharvested
from .simulation import Replicates, simulate
from .transitions import gp_transitions, model_transitions

__all__ = [
    "Allen",
    "Fit",
    "GaussianProcess",
    "LogPosterior",
    "Myers",
    "Policy",
    "Posterior",
    "Replicates",
    "Ricker",
    "fit",
    "gp_policy",
    "gp_transitions",
    "model_transitions",
    "most_likely",
    "sample",
    "sample_hyperparameters",
    "simulate",
    "simulate_unharvested",
    "solve",
]
