"""The command line: the only package that prints to a person and exits. It imports all others, when they are needed."""
