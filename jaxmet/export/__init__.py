"""Files for other programs.

onnx_file       the model as ONNX, in integers
deployed        what a target runs: parameters known, folded norms gone
onnx_graph      an ONNX graph by what makes and what reads its values
onnx_passes     the ONNX graph in the form that runtimes fuse
safetensors_file
                trees and quantizers for any program
"""

from jaxmet.export.onnx_file import onnx as onnx
from jaxmet.export.safetensors_file import read_safetensors as read_safetensors
from jaxmet.export.safetensors_file import safetensors as safetensors
