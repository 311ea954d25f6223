"""The activations a crosscoder is trained and measured on."""
