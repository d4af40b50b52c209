"""Public models that other people wrote, and one battery of checks for each of them."""
