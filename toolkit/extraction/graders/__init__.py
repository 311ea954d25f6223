"""One module for each way of reading an answer; ``schemas.tasks.GRADERS`` names their classes."""
