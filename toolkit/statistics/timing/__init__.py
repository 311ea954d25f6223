"""When features and sets of features stop changing during training (claim C2)."""
