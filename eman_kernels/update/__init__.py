"""What happens in each step: arguments are checked, a plan is found by its guards, and its backends are run."""
