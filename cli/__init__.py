"""How it is called."""


def main() -> None:
    """Entry point."""
