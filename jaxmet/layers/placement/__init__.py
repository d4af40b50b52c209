"""Which weights and values get a quantizer, by the configuration, the target and the graph.

placement         all of it in one value: weights, activations, biases, and what is left and why
placed_weights    weights, and along which axes their scales lie
placed_activations  results that a device stores, or that products read; what shares a quantizer
placed_biases     int32 biases, and whose scales make theirs
residual_streams  what is too wide for 8 bits, and is quantized where products read it
transformed_inputs  what layers divide or rotate, quantized as it enters them
cached_values     inputs that a model returns with new values: one quantizer for both
rotary_embeddings  rotations by positions, of which only the sum has a quantizer
target_rules      what a target's table says of the nodes of a graph
rule_targets      which tensors the rules of a configuration reach
"""
