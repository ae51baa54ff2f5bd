"""The command line."""

from convsplit.cli.entry import main as main
