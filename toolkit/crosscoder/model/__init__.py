"""The crosscoder itself: weights, sparsity rules at inference, readouts, files."""
