"""Files for other programs.

onnx_file       the model as ONNX, in integers
deployed        what a target runs: parameters known, folded norms gone
onnx_passes     the ONNX graph in the form that runtimes fuse
"""

from jaxmet.export.onnx_file import onnx as onnx
