"""Equations for what runs them: XLA:CPU, and other runtimes.

cpu              which convolutions are replaced, chosen when a program is lowered
litert_lowering  a function's equations as StableHLO for LiteRT's converter
onnx_lowering    a function's equations as an ONNX model
shifts           convolutions as sums of shifted inputs times a number
"""
