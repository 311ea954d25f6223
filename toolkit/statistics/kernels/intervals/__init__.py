"""Intervals and standard errors: bootstrap, jackknife, proportions and clusters."""
