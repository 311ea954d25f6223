"""How many prompts and runs an effect needs, and simulated studies whose truth is known."""
