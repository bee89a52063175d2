"""Files and the names in them: `reading` and `writing` are the only doors, `characters` shows names as they can be read.

Imports errors alone.
"""
