"""Likelihood: the bits per dimension of data under a network, by its flow or by a bound."""

from diffcore.evaluation.likelihood.bits import Likelihood, bits_per_dimension, join_likelihoods
from diffcore.evaluation.likelihood.bound import Bound, variational_bound
from diffcore.evaluation.likelihood.density import FlowDensity, flow_log_density
from diffcore.evaluation.likelihood.dequantisation import TruncatedNormal, Uniform
from diffcore.evaluation.likelihood.trace import ExactTrace, Hutchinson

__all__ = [
    "Bound",
    "ExactTrace",
    "FlowDensity",
    "Hutchinson",
    "Likelihood",
    "TruncatedNormal",
    "Uniform",
    "bits_per_dimension",
    "flow_log_density",
    "join_likelihoods",
    "variational_bound",
]
