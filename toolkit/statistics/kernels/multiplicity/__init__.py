"""Many hypotheses at once: corrections, partial conjunction, bounds of false discoveries."""
