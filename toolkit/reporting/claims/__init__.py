"""The five claims, each assessed from results."""
