"""Files for other programs.

onnx_file       the model as ONNX, in integers
encodings_file  a float ONNX file, and its grids for AIMET
encodings_reader
                AIMET's encodings as grids
file_check      a file run beside the simulation and the float model
flat_model      a model as converters take it: a function of arrays, all named
integer_steps   the operations of a model in integers
integers_file   each layer's integers and scales as plain arrays
litert_file     the model as a LiteRT file (.tflite), in integers
litert_interface
                a LiteRT file with integers for inputs and outputs
litert_requantized
                a LiteRT file by way of a float one
litert_table    the operations of a LiteRT file
onnx_forms      what JAX writes as several operations as the one that ONNX has
onnx_graph      an ONNX graph by what makes and what reads its values
onnx_passes     the ONNX graph in the form that runtimes fuse
onnx_products   products as the operations that runtimes have in integers
runtimes        a file in the runtime that runs it
safetensors_file
                trees and quantizers for any program
stablehlo_file  the model in integers for JAX, without jaxmet
"""

from jaxmet.export.encodings_file import encodings as encodings
from jaxmet.export.encodings_reader import read_encodings as read_encodings
from jaxmet.export.file_check import check as check
from jaxmet.export.integers_file import integers as integers
from jaxmet.export.litert_file import litert as litert
from jaxmet.export.onnx_file import onnx as onnx
from jaxmet.export.safetensors_file import read_safetensors as read_safetensors
from jaxmet.export.safetensors_file import safetensors as safetensors
from jaxmet.export.stablehlo_file import stablehlo as stablehlo
