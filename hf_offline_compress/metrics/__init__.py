"""How good a model is on a text. Models and texts only: the judge of sizes and the evaluation both use it."""
