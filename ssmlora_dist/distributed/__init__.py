"""Processes, DeepSpeed's configuration and engines; the only importer of deepspeed."""
