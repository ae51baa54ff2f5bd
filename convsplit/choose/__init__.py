"""Choosing: options of every layer, budgets, the allocation of one to the other, and plans, all as plain values."""
