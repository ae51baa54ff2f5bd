"""Choosing: options of every layer, budgets, the allocation of one to the other, and plans, all as plain values."""

from convsplit.choose.budget import Budget as Budget
from convsplit.choose.plan import Conditions as Conditions
from convsplit.choose.plan import Plan as Plan
from convsplit.choose.plan import PlannedLayer as PlannedLayer
