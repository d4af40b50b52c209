"""The runtimes that `jm.QuantConfig.for_target` knows, each with its source.

target       `jm.Target`, and what the tables share
onnxruntime  ONNX Runtime
openvino     OpenVINO
litert       LiteRT
xla          XLA, by `jm.lift`
htp          Qualcomm's HTP
tensorrt     TensorRT
"""

from jaxmet.tree.targets.htp import TARGET as htp
from jaxmet.tree.targets.litert import TARGET as litert
from jaxmet.tree.targets.onnxruntime import TARGET as onnxruntime
from jaxmet.tree.targets.openvino import TARGET as openvino
from jaxmet.tree.targets.target import Target as Target
from jaxmet.tree.targets.tensorrt import TARGET as tensorrt
from jaxmet.tree.targets.xla import TARGET as xla

TARGETS = {t.name: t for t in (onnxruntime, openvino, litert, xla, htp, tensorrt)}
"""All of them by name."""
