"""What a batch job is made of: its config, inputs, workers, parts and report."""
