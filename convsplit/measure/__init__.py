"""Time where the model will run: layers and whole models in milliseconds, and models made ready to be deployed."""

from convsplit.measure.bench import Bench as Bench
from convsplit.measure.bench import BenchRow as BenchRow
from convsplit.measure.deployment import for_inference as for_inference
from convsplit.measure.stopwatch import Stopwatch as Stopwatch
from convsplit.measure.timing import Timing as Timing
from convsplit.measure.timing import time_models as time_models
