"""What a round takes on devices that need not be there: memory, FLOPs, traffic, time."""
