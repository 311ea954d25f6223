"""What every statistic stands on: feature blocks, units and clusters, labels, checks, correction over a family."""
