"""What the training and evaluation loops need around the models: data, files, schedules, processes."""
