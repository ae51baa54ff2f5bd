"""Split layers: a convolution written as depthwise and pointwise stages."""

from convsplit.layers.separable import SeparableConv as SeparableConv
from convsplit.layers.separable import SeparableConv1d as SeparableConv1d
from convsplit.layers.separable import SeparableConv2d as SeparableConv2d
from convsplit.layers.separable import SeparableConv3d as SeparableConv3d
from convsplit.layers.separable import SeparableConvTranspose1d as SeparableConvTranspose1d
from convsplit.layers.separable import SeparableConvTranspose2d as SeparableConvTranspose2d
from convsplit.layers.separable import SeparableConvTranspose3d as SeparableConvTranspose3d
from convsplit.layers.separable import SeparableLinear as SeparableLinear
