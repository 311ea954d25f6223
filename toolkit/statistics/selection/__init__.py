"""Which features separate the target model from base where it gained (claim C3)."""
