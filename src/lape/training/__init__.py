"""One run: the loop, what it is made of, its checkpoints and curves; evaluation and prediction with what it left.

Imports nothing of sharing, analysis, studies, report and cli.
"""
