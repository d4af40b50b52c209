"""Two residual networks trained on Fashion-MNIST: what `compression.py` compresses.

networks    a ResNet18 and a ResNet50, narrow, for 28x28 grey images
"""

from pathlib import Path

from dfq.networks import Tree, load_weights

from residual.networks import NETWORKS, ResNet

HERE = Path(__file__).resolve().parent


def load(name: str) -> tuple[ResNet, Tree]:
    """The module and variables of 'resnet18' or 'resnet50'.

    The files hold float16, which `train_residual.py` wrote; the leaves are float32.
    """
    return NETWORKS[name](), load_weights(HERE / f"{name}.npz")
