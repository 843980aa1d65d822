"""A saved model and a prompt to a video: the model folder, the pipeline and the command."""
