"""What inputs tell about a model: batches, moments, sensitivities, and the walk through two models side by side."""
