"""How one budget is shared among groups, and how large the budget must be for an allowed loss."""
