"""The crosscoder itself: weights, readouts, files."""
