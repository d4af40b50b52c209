"""What `parity.py` compares: networks, ways to quantize them, and the runtimes of their files.

cases           networks and ways to quantize, with what the simulation says of each
transformer     a transformer block
in_jax          integers in JAX, the artefact of StableHLO, stored trees
in_onnxruntime  ONNX files in onnxruntime
wide_files      … with activations of 16 bits, and weights alone
in_openvino     the same files in OpenVINO
in_litert       LiteRT files
layers          each layer fed a runtime's integers
onnx_layers     … those of onnxruntime
litert_layers   … those of LiteRT
accuracy        EfficientNet-Lite0 on pictures, beside onnxruntime's own quantization
figures         shares, decibels, ratios of times, tables
"""
