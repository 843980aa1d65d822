"""The networks and the maths: video VAE, diffusion transformer, text encoder, objectives, samplers.

Nothing in this room knows of files, processes, logging or torch.distributed.
"""
