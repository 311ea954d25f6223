"""What a trained crosscoder is used for: health, summaries of prompts, what features look like."""
