"""convsplit: the convolutions of a trained model, split into depthwise and pointwise ones."""

from convsplit.api import bench as bench
from convsplit.api import convert as convert
from convsplit.api import frontier as frontier
from convsplit.api import make_plan as make_plan
from convsplit.api import study as study
from convsplit.choose.budget import Budget as Budget
from convsplit.choose.plan import Plan as Plan
from convsplit.choose.plan import PlannedLayer as PlannedLayer
from convsplit.finetune import Distillation as Distillation
from convsplit.finetune import Reconstructed as Reconstructed
from convsplit.finetune import check_optimizer as check_optimizer
from convsplit.finetune import distill as distill
from convsplit.finetune import kernel_penalty as kernel_penalty
from convsplit.finetune import parameter_groups as parameter_groups
from convsplit.finetune import reconstruct as reconstruct
from convsplit.kinds import Equivalent as Equivalent
from convsplit.kinds import register as register
from convsplit.layers.separable import SeparableConv2d as SeparableConv2d
from convsplit.measure.bench import Bench as Bench
from convsplit.measure.deployment import for_inference as for_inference
from convsplit.measure.stopwatch import Stopwatch as Stopwatch
from convsplit.progress import ConversionWarning as ConversionWarning
from convsplit.repair.recalibration import recalibrate as recalibrate
from convsplit.repair.refitting import Repaired as Repaired
from convsplit.repair.refitting import refit as refit
from convsplit.report import Frontier as Frontier
from convsplit.report import Report as Report
from convsplit.report import compare as compare
from convsplit.rewrite import apply_plan as apply_plan
from convsplit.rewrite import merge as merge
from convsplit.storage import load as load
from convsplit.storage import save as save
from convsplit.storage import save_folder as save_folder
from convsplit.studies import Study as Study

__version__ = "0.1.0"
