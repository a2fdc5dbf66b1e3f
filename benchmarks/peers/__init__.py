"""What a user would otherwise run on the same machine, set up and started for comparison."""
