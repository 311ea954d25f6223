"""What is computed: from post-training to the report."""
