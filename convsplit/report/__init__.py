"""Reports: what a conversion saved, how far it moved the weights, every layer's output and the model's output.

The rooms inside:

    values.py      the figures of a conversion; text, JSON, CSV, Markdown
    verdict.py     what they mean, in words
    diff.py        two reports side by side
    curves.py      Frontier: the whole curve of budget against drift
    svg.py         plots without a plotting library
    page.py        the page to look at
    reports.py     Report: the figures, and every way to look at them
    comparison.py  measures a report on two models
    frontier.py    measures a frontier
    quality.py     measures what a conversion loses, on held-out inputs
    found.py       Found: what a search for a certain quality tried and found
    plots.py       pictures as matplotlib figures
"""

from convsplit.report.comparison import compare as compare
from convsplit.report.curves import Curve as Curve
from convsplit.report.curves import CurvePoint as CurvePoint
from convsplit.report.curves import Frontier as Frontier
from convsplit.report.curves import FrontierPoint as FrontierPoint
from convsplit.report.diff import ReportDiff as ReportDiff
from convsplit.report.found import Found as Found
from convsplit.report.found import Trial as Trial
from convsplit.report.quality import Quality as Quality
from convsplit.report.reports import Report as Report
from convsplit.report.values import Drift as Drift
from convsplit.report.values import KeptLayer as KeptLayer
from convsplit.report.values import LayerReport as LayerReport
from convsplit.report.verdict import Verdict as Verdict
