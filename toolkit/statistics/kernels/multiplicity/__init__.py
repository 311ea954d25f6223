"""Multiple testing: corrections, partial conjunction, bounds on false discoveries and on stability selection."""
