"""What a crosscoder is trained and measured on."""
