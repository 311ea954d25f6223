"""What a causal trial shows: outcome tables, matched controls, criteria V1 to V6 and the verdict (claims C4, C5)."""
