"""Files and the names in them: `reading` and `writing` are the only doors, `characters` makes names readable.

Imports errors alone.
"""
