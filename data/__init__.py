"""From bytes on disk to batches: video files, manifests, the procedural world, the loader."""
