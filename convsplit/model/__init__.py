"""Models as they come: how they are run, watched, copied and traced, and where their convolutions are."""
