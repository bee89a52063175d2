"""A join on a foreign vision transformer, in place: apply, remove, fold, and the ladder of rungs that it hands on.

Imports hosts, method and errors alone.
"""
