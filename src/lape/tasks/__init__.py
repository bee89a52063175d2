"""What is learned: a task knows its loss, its metric, and how a batch becomes a number."""
