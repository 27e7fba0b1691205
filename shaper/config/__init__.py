"""Settings as operators write them: budgets, groups, schedules, and where they come from."""
