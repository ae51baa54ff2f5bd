"""convsplit: the convolutions of a trained model, split into depthwise and pointwise ones.

What most programs need is here; the rest lives in named places: `convsplit.kinds` (other convolution classes),
`convsplit.finetune` (training loops of one's own), `convsplit.measure` (time), `convsplit.repair`, `convsplit.report`,
`convsplit.storage`, `convsplit.passes` (fx pipelines) and `convsplit.layers` (split layers of other dimensions).
"""

from convsplit.api import bench as bench
from convsplit.api import convert as convert
from convsplit.api import frontier as frontier
from convsplit.api import make_plan as make_plan
from convsplit.api import study as study
from convsplit.checkpoints import restore as restore
from convsplit.choose.budget import Budget as Budget
from convsplit.choose.plan import Plan as Plan
from convsplit.exports import export as export
from convsplit.finetune import distill as distill
from convsplit.finetune import reconstruct as reconstruct
from convsplit.layers.separable import SeparableConv as SeparableConv
from convsplit.layers.separable import SeparableConv2d as SeparableConv2d
from convsplit.measure import Stopwatch as Stopwatch
from convsplit.measure import for_inference as for_inference
from convsplit.progress import ConversionWarning as ConversionWarning
from convsplit.repair import refit as refit
from convsplit.report import compare as compare
from convsplit.rewrite import apply_plan as apply_plan
from convsplit.rewrite import merge as merge
from convsplit.storage import load as load
from convsplit.storage import save as save
from convsplit.studies import Study as Study

__version__ = "0.1.0"
