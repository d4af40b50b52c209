"""What `python -m jaxmet` runs: a small trained network, its data, and the tables."""
