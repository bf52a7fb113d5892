"""What the user asks for: recipes, their parts, and the presets."""
