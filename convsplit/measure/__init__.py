"""Time where the model will run: layers and whole models in milliseconds, and models made ready to be deployed."""
