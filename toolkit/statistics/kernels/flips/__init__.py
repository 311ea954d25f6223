"""Sign flips and permutations: exact, saddlepoint, Monte-Carlo, joint maximum, wild bootstrap."""
