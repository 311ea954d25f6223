"""Sign flips and permutations: exact, saddlepoint, Monte-Carlo, joint maximum, histograms, wild bootstrap."""
