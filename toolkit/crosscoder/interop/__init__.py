"""Crosscoder weights in the formats of other tools, and decoders as labelled arrays."""
