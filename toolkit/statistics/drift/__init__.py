"""What differs between two models on the same prompts: features and whole representations."""
