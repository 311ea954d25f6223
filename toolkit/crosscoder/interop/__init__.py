"""Crosscoders of other tools, and crosscoders as labelled arrays."""
