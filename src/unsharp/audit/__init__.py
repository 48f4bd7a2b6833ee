"""The audit of a deletion request: what was asked and done, tests with bounds set before, what is still there."""
