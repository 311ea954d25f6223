"""What things are: names, specs and declared layouts. No input/output, no torch."""
