"""Fine-tuning: the shortest way back to full accuracy, without labels.

blocks.py        the parts of a model that are reconstructed one after the other
reconstruct.py   block by block, seconds each
distill.py       end to end, from the original as the teacher
groups.py        parameter groups and checks for training loops of one's own
"""

from convsplit.finetune.distillation import Check as Check
from convsplit.finetune.distillation import Distillation as Distillation
from convsplit.finetune.distillation import distill as distill
from convsplit.finetune.groups import check_optimizer as check_optimizer
from convsplit.finetune.groups import kernel_penalty as kernel_penalty
from convsplit.finetune.groups import parameter_groups as parameter_groups
from convsplit.finetune.reconstruction import Reconstructed as Reconstructed
from convsplit.finetune.reconstruction import reconstruct as reconstruct
