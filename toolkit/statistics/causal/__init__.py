"""Whether a causal trial shows what it was held for: outcomes, matched controls, criteria, verdict (claims C4, C5)."""
