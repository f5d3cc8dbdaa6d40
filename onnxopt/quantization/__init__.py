"""Number formats in graphs: which layers carry codes, how weights are stored, and the nodes that say so.

Passes that quantize are thin: they say what is wanted, and this room does it, for every format the same way.
"""
