"""Numpy-only estimators: units on axis 0, features on the last axis."""
