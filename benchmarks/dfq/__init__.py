"""Two small networks with the shapes that data-free quantization was shown on.

scenes      images composed of Fashion-MNIST garments, with pixel labels and boxes
networks    a DeepLabV3+-style segmentation net, an SSD-Lite-style detector, weights
boxes       anchors, matching, decoding, non-maximum suppression
metrics     mIoU and mAP with intervals
stress      a copy of a network whose channels were rescaled, with the same function
"""
