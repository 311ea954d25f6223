"""How a crosscoder is trained."""
