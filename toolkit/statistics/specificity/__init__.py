"""Which model a feature belongs to: decoder norms, latent scaling, matching, the contrast of arms (claim C1)."""
