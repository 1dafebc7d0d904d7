"""Likelihood: the bits per dimension of data under a network, by its flow or by a bound."""
