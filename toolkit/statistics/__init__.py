"""What is computed from stored activations: labelled statistics over numpy kernels."""
