"""What an edit of features is, and the hooks that apply it inside a live model."""
