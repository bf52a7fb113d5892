"""Statistics of a model on text: what each group's errors cost."""
