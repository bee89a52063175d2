"""Files and the names in them: `reading` and `writing` are the only doors, `characters` makes names readable.

`locks` keeps a folder to one process at a time.

Imports errors alone.
"""
