"""What `python -m jaxmet` runs: a small trained network, its data, and the tables.

data     the data and the trained weights
network  the network
run      the table
"""
