"""Several processes: collectives, a heartbeat, FSDP2, DeepSpeed."""
