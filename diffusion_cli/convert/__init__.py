"""Models of other programs in terms of this package, and the way back.

Each module maps one architecture or file format: configurations without torch, weights with it.
"""
