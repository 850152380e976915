"""Tasks: a model with the data and the loss it is trained on."""
