"""Which axis is which.

labels   union-find over axis atoms
views    equations that only look at an array differently
"""
