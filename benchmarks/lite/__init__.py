"""EfficientNet-Lite: the networks, their trained weights, pictures and figures of merit."""
