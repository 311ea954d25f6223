"""Uses of a trained crosscoder: health, prompt summaries, contexts and promoted tokens of features."""
