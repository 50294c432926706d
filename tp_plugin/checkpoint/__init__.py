"""Formats on disk, read and written without torch.distributed: atomic folders, DeepSpeed's files, DCP chunks."""
