"""Split layers: a convolution written as depthwise and pointwise stages."""
