"""Runtimes: where a model is run, each as one value that turns a model and its inputs into a callable to be timed."""

from convsplit.runtimes.base import Runtime as Runtime
from convsplit.runtimes.named import RUNTIMES as RUNTIMES
from convsplit.runtimes.named import runtime_of as runtime_of
