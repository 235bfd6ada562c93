"""One plain script a table or figure; each writes its result under experiments/results/."""
