"""Checkpoints of converted models that other code has written: state_dicts, wherever they are kept, and back."""

from convsplit.checkpoints.recognition import recognise as recognise
from convsplit.checkpoints.restoring import restore as restore
from convsplit.checkpoints.restoring import skeleton as skeleton
