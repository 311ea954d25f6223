"""What all statistics share: feature blocks, units and clusters, coordinates, comparability, family-wide correction."""
