"""Sums of the clients' updates: what each protocol shows to whom stands in its module."""

from protocols.aggregation.cohort import Aggregate, Cohort, Round

__all__ = ["Aggregate", "Cohort", "Round"]
