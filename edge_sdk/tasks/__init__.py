"""What a model's outputs mean: a file for each task, with its loss, metric, confidence, labels."""
