"""A join on a foreign vision transformer, in place: `operation` has apply, remove, fold, ladder, and tells the story.

`building` adds tables and PE norms, `embedding` begins a forward where the host adds its table, `hooks` hand each block
its rung, `fused` and `kernels` have a GPU norm and add at once, `positions` makes the rungs, `forwards` keeps those of
one forward apart from those of another, `standins` answer in place of the host's methods.

Imports hosts, method and errors alone.
"""
