"""What keeps a run alive and on record: its folder, processes, signals, log, result, and the sweeps it belongs to."""
