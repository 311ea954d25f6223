"""Causal trials: planned without torch, run on live models, judged from outcome tables."""
